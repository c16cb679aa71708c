"""common.py: backbones against torchvision, data and its faults, augmentation against torchvision, LARS, checkpoints."""
import resource
import signal

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from helpers import ROOT, make_images
from PIL import Image

import common
import evaluate
import shapes
import training
import weights

# --- backbones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", common.ARCHITECTURES)
def test_shapes_of_maps(arch):
    size = 64 if "tiny_" in arch else 128
    with torch.no_grad(), torch.device("meta"):  # shapes without the arithmetic
        backbone = common.build_backbone(arch, size).eval()
        for side in (size, size + backbone.stride):
            grid = side // backbone.stride
            maps, pooled = backbone(torch.randn(2, 3, side, side))
            assert maps.shape == (2, grid * grid, backbone.dim) and pooled.shape == (2, backbone.dim)


def test_small_images_get_the_small_stem():
    backbone = common.build_backbone("resnet18", 32)
    assert backbone.stride == 8 and backbone(torch.randn(2, 3, 32, 32))[0].shape == (2, 16, 512)


def test_maps_are_row_major():
    backbone = common.TinyConvNet().eval()
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, :24, 40:] = 5  # the upper right corner
    changed = (backbone(x)[0] - backbone(torch.zeros(1, 3, 64, 64))[0]).square().sum(2).view(8, 8)
    assert changed[:4, 4:].sum() > 0.8 * changed.sum() > 0


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "convnext_tiny"])
def test_torchvision_loads_the_weights_and_agrees(arch):
    torch.manual_seed(0)
    ours, theirs = common.build_backbone(arch, 224).eval(), getattr(torchvision.models, arch)(weights=None).eval()
    left = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not left.unexpected_keys and all(k.startswith(("fc", "classifier.2")) for k in left.missing_keys)
    *_, head = theirs.modules()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(head(ours(x)[1]), theirs(x), rtol=1e-4, atol=1e-5)


def test_residual_branches_start_at_zero():
    backbone = common.build_backbone("resnet50")
    assert all(not m.bn3.weight.any() for m in backbone.modules() if hasattr(m, "bn3"))


def test_vit_is_torchvisions_under_the_names_of_dino():
    ours = common.ViT(48, 2, 4, 8, 32, 0.0).eval()
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 192).eval()
    torch.nn.init.normal_(ours.pos_embed)
    state = ours.state_dict()
    assert list(state)[:4] == ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
             "norm": "encoder.ln"}
    for i in range(2):
        layer = f"encoder.layers.encoder_layer_{i}."
        names |= {f"blocks.{i}.norm1": layer + "ln_1", f"blocks.{i}.norm2": layer + "ln_2",
                  f"blocks.{i}.attn.qkv": layer + "self_attention.in_proj",
                  f"blocks.{i}.attn.proj": layer + "self_attention.out_proj",
                  f"blocks.{i}.mlp.fc1": layer + "mlp.0", f"blocks.{i}.mlp.fc2": layer + "mlp.3"}
    renamed = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        name = names.get(key) or f"{names[stem]}{'_' if names[stem].endswith('in_proj') else '.'}{leaf}"
        renamed[name] = value
    left = theirs.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys and all(k.startswith("heads") for k in left.missing_keys)
    theirs.heads = torch.nn.Identity()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[1], theirs(x), rtol=1e-4, atol=1e-5)


def test_position_embeddings_follow_the_grid():
    vit = common.ViT(16, 2, 2, 8, 64, 0.0)
    torch.nn.init.normal_(vit.pos_embed)
    assert vit.positions(8, 8) is vit.pos_embed
    ramp = torch.arange(8.0).repeat(8, 1)  # the column
    vit.pos_embed.data[:, 1:] = ramp.reshape(1, 64, 1)
    wide = vit.positions(8, 16)[0, 1:].reshape(8, 16, 16)
    assert (wide[:, 1:] > wide[:, :-1]).all() and torch.allclose(wide, wide[:1].expand_as(wide))


# --- data ----------------------------------------------------------------------------------------------------------


def test_folders(tmp_path):
    flat = make_images(tmp_path / "flat", 5, classes=0)
    assert len(common.open_data(str(flat))) == 5 and not common.open_data(str(flat)).classes
    nested = make_images(tmp_path / "nested" / "2021" / "may", 3, classes=0).parents[1]
    make_images(nested / "2022", 2, classes=0)
    (nested / "2021" / "loop").symlink_to(nested)
    assert len(common.open_data(str(nested))) == 5 and common.open_data(str(nested)).label(0) == -1
    classes = make_images(tmp_path / "sorted", 6, classes=3)
    data = common.open_data(str(classes))
    assert data.classes == ["class0", "class1", "class2"] and [data.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    make_images(tmp_path / "split" / "train", 4)
    make_images(tmp_path / "split" / "test", 2)
    assert len(common.open_data(str(tmp_path / "split"))) == 4 and len(common.open_data(str(tmp_path / "split"), "val")) == 2
    assert common.open_data(str(flat), "val") is None


def test_a_folder_in_DATA(tmp_path, monkeypatch):
    make_images(tmp_path / "imagenet" / "train", 4)
    monkeypatch.setenv("DATA", str(tmp_path))
    assert len(common.open_data("imagenet")) == 4


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    import pickle
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        with open(folder / name, "wb") as file:
            pickle.dump({"data": np.full((2, 3072), 7, np.uint8), "labels": [3, 9]}, file)
    with open(folder / "batches.meta", "wb") as file:
        pickle.dump({"label_names": list("abcdefghij")}, file)
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    train, val = common.open_data("cifar10"), common.open_data("cifar10", "val")
    assert len(train) == 10 and len(val) == 2 and train.label(1) == 9 and train.load(0).size == (32, 32)


def test_every_kind_of_file_decodes_upright_in_rgb(tmp_path):
    colour = np.zeros((20, 30, 3), np.uint8)
    colour[:, :15] = 255, 0, 0
    image, gray = Image.fromarray(colour), np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    image.convert("P").save(tmp_path / "a_palette.png")
    image.convert("RGBA").save(tmp_path / "b_rgba.png")
    image.convert("CMYK").save(tmp_path / "c_cmyk.jpg", quality=100)
    exif = Image.Exif()
    exif[0x112] = 6  # shown after a quarter turn clockwise
    image.transpose(Image.ROTATE_90).save(tmp_path / "d_turned.png", exif=exif)
    for name in ("e_gray.png", "f_gray.tif"):
        Image.fromarray(gray).save(tmp_path / name)
    image.convert("L").save(tmp_path / "g_gray.jpg")
    data = common.open_data(str(tmp_path))
    for i in range(len(data)):
        pixels = np.asarray(data.load(i)).astype(int)
        assert pixels.shape == (20, 30, 3), data.name(i)
        if i < 4:
            assert np.abs(pixels[:, :12] - [255, 0, 0]).max() < 40 and pixels[:, 18:].max() < 40, data.name(i)
        elif i < 6:
            assert np.abs(pixels[..., 0] - gray / 257).max() <= 1


def test_shapes_are_deterministic_at_any_size():
    a, b = shapes.Shapes("train", 96), shapes.Shapes("train", 96)
    assert np.array_equal(a.scene(7)[0], b.scene(7)[0]) and not np.array_equal(a.scene(7)[0], a.scene(8)[0])
    assert not np.array_equal(a.scene(7)[0], shapes.Shapes("val", 96).scene(7)[0])
    for size in (32, 100, 224):
        image, mask = shapes.Shapes("train", size).scene(5)
        assert image.shape == (size, size, 3) and mask.shape == (size, size)
    agree, ground = 0, []
    for i in range(200):
        mask = a.scene(i)[1]
        areas = np.bincount(mask.ravel(), minlength=13)
        agree += areas[1:].argmax() == a.label(i)
        ground.append(areas[0] / areas.sum())
    assert agree > 170 and 0.5 < np.mean(ground) < 0.9  # the label's class covers the most
    assert set(range(12)) == {a.label(i) for i in range(200)}


def test_raw_pixels_do_not_tell_the_class_of_a_scene():
    def raw(split, count):
        data = shapes.Shapes(split, 64)
        x = np.stack([data.scene(i)[0] for i in range(count)]).reshape(count, -1)
        return common.normalize(torch.tensor(x).view(count, 64, 64, 3).permute(0, 3, 1, 2) / 255).flatten(1), \
            torch.tensor([data.label(i) for i in range(count)])
    (x, y), (queries, targets) = raw("train", 3000), raw("val", 1000)
    similarity, labels = evaluate.nearest(queries, [(x, y)], 20)
    assert (evaluate.vote(similarity, labels, 12) == targets).float().mean() < 1.5 / 12


def coordinates(height, width):
    """An image whose red is its column and green its row, in pixels."""
    y, x = np.mgrid[0:height, 0:width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, 0 * x], 2))


@pytest.mark.parametrize("box", [(0, 0, 200, 240), (31, 77, 64, 64), (10, 20, 150, 90), (0, 0, 16, 16), (180, 224, 20, 16)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_view_shows_its_box(box, flip):
    size, (top, left, height, width) = 32, box
    view = common.cut(coordinates(200, 240), box, flip, size).float()
    x = left + (torch.arange(size) + 0.5) * width / size - 0.5  # what the centre of each column shows
    y = top + (torch.arange(size) + 0.5) * height / size - 0.5
    x = x.flip(0) if flip else x
    inner = slice(2, -2)  # at the border there is less to average over
    assert (view[0] - x)[inner, inner].abs().max() < 1 and (view[1] - y[:, None])[inner, inner].abs().max() < 1


def test_batches_start_anywhere_and_split_over_processes():
    everything = list(common.Batches(103, 20, 0, 12, seed=3))
    assert len(everything) == 12 and all(len(b) == 20 for b in everything)
    assert list(common.Batches(103, 20, 7, 12, seed=3)) == everything[7:]
    for epoch in range(2):
        seen = [i for batch in everything[5 * epoch:5 * epoch + 5] for _, i in batch]
        assert len(set(seen)) == 100 and {e for batch in everything[5 * epoch:5 * epoch + 5] for e, _ in batch} == {epoch}
    assert everything[0] != list(common.Batches(103, 20, 0, 1, seed=4))[0]
    shares = [list(common.Batches(103, 20, 0, 12, 3, rank, 4)) for rank in range(4)]
    for whole, *parts in zip(everything, *shares):
        assert all(len(p) == 5 for p in parts) and sorted(sum(parts, [])) == sorted(whole)


def two_views(rng, height, width):
    return [((rng.randint(0, 8), rng.randint(0, 8), 32, 24), rng.random() < 0.5, 16) for _ in range(2)]


def test_batches_do_not_depend_on_workers(tmp_path):
    data = common.open_data(str(make_images(tmp_path, 20)))
    order = list(common.Batches(20, 4, 0, 7, seed=0))
    views = common.Views(data, two_views, 5)
    runs = [list(torch.utils.data.DataLoader(views, batch_sampler=order, num_workers=n)) for n in (0, 1, 2)]
    for first, *others in zip(*runs):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first.views, other.views))
            assert all(torch.equal(a, b) for a, b in zip(first[1:], other[1:]))
    assert not torch.equal(runs[0][0].boxes, runs[0][5].boxes)  # another epoch, other crops


# --- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,low,high", [("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2),
                                           ("hue", -0.5, 0.5)])
def test_jitter_is_torchvisions(name, low, high):
    x = torch.rand(16, 3, 20, 24)
    x[0], x[1] = 0.5, (x[1] > 0.5).float()  # grey and saturated colours have no hue of their own
    factor = torch.linspace(low, high, 16)
    ours = getattr(common, f"adjust_{name}")(x, factor.view(-1, 1, 1, 1))
    theirs = torch.stack([getattr(TF, f"adjust_{name}")(image, f.item()) for image, f in zip(x, factor)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(64, 64), (30, 48), (12, 12)])
def test_blur_is_torchvisions(size):
    x, sigma = torch.rand(8, 3, *size), torch.linspace(0.1, 2, 8)
    theirs = torch.stack([TF.gaussian_blur(image, [23, 23], [s.item()] * 2) for image, s in zip(x, sigma)])
    torch.testing.assert_close(common.gaussian_blur(x, sigma), theirs, rtol=0, atol=1e-5)


def test_grayscale_solarize_normalize_are_torchvisions():
    x = torch.rand(4, 3, 9, 9)
    torch.testing.assert_close(common.gray(x).expand_as(x), TF.rgb_to_grayscale(x, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(common.solarize(x), TF.solarize(x, 0.5))
    torch.testing.assert_close(common.normalize(x), TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def test_photometric_draws_once_a_sample():
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(400, -1, -1, -1)
    plain = common.normalize(x.float() / 255)

    def changed(**options):
        y = common.Photometric(**{"jitter_p": 0, "gray_p": 0, **options})(x, torch.Generator().manual_seed(1))
        return (y - plain).abs().amax((1, 2, 3)) > 1e-6, y
    assert not changed()[0].any() and changed(blur_p=1.0)[0].float().mean() > 0.95
    for option in ("gray_p", "blur_p", "solarize_p"):
        assert 0.2 < changed(**{option: 0.3})[0].float().mean() < 0.4
    some, y = changed(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8)
    assert 0.7 < some.float().mean() < 0.9 and len(y[some].flatten(1).unique(dim=0)) == some.sum()
    assert torch.equal(y, changed(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8)[1])


@pytest.mark.parametrize("op,strength", [(0, 0.4), (1, 0.4), (2, 0.2), (3, 0.1)])
def test_photometric_draws_colorjitters_range(op, strength):
    jitter = [0.0] * 4
    jitter[op] = strength
    seen = []
    photometric = common.Photometric(jitter, jitter_p=1, gray_p=0)
    photometric.ops = [lambda x, f: (seen.append(f.flatten()), x)[1]] * 4
    photometric(torch.zeros(2000, 3, 2, 2, dtype=torch.uint8), torch.Generator().manual_seed(0))
    middle = 0 if op == 3 else 1
    factors = torch.cat(seen)
    assert len(factors) == 2000 and middle - strength <= factors.min() < middle - 0.98 * strength
    assert middle + 0.98 * strength < factors.max() <= middle + strength


# --- optimisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_cuda", [False, True])
def test_lars_golden(monkeypatch, is_cuda):
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)  # how parameters are grouped
    g = {k: torch.tensor(v) for k, v in np.load(ROOT / "tests/golden/lars.npz").items()}
    params = [torch.nn.Parameter(g[f"init_{i}"].clone()) for i in range(4)]
    lars = training.LARS(params, weight_decay=g["weight_decay"].item(), momentum=g["momentum"].item(), eta=g["eta"].item())
    for step in range(6):
        if step == 3:  # the state survives a checkpoint
            state = lars.state_dict()
            lars = training.LARS(params, weight_decay=0.5)
            lars.load_state_dict(state)
        for i, p in enumerate(params):
            p.grad = g[f"grad_{i}"][step].clone()
        lars.param_groups[0]["lr"] = g["lr"][step].item()
        lars.step()
    for i, p in enumerate(params):
        torch.testing.assert_close(p.data, g[f"final_{i}"], rtol=1e-9, atol=1e-12)


def test_cosine_schedule():
    values = [training.cosine_schedule(s, 100, 10, 2.0, 0.5) for s in range(101)]
    assert values[0] == 0 and values[5] == 1.0 and values[10] == 2.0
    assert values[55] == pytest.approx(1.25) and values[100] == 0.5
    assert all(a > b for a, b in zip(values[10:], values[11:]))
    assert training.cosine_schedule(0, 10, 0, 1.0, 0.0) == 1.0


# --- run -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path, old = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    training.write(path, lambda file: torch.save({"step": 1}, file))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(common.UserError, match="cannot write .*last.pt.*is intact"):
            training.write(path, lambda file: torch.save({"step": 2, "big": torch.zeros(10 ** 6)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert torch.load(path, weights_only=True) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_step_seeds_are_functions_of_seed_and_step():
    def draw(seed, step):
        generator = training.seed_step(seed, step)
        return torch.rand(3), torch.rand(3, generator=generator)
    a, b, c, d = draw(0, 1), draw(0, 1), draw(0, 2), draw(1, 1)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not any(torch.equal(a[i], other[i]) for other in (c, d) for i in range(2)) and not torch.equal(*a)


@pytest.mark.parametrize("arch,size", [("resnet18", 224), ("resnet18", 32), ("tiny_vit", 48), ("convnext_tiny", 224)])
def test_load_backbone(tmp_path, arch, size):
    backbone = common.build_backbone(arch, size).eval()
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    x = torch.randn(2, 3, 64, 64)
    loaded = weights.load_backbone(tmp_path / "backbone.pt", arch)
    assert torch.equal(loaded(x)[0], backbone(x)[0]) and not loaded.training
    with pytest.raises(common.UserError, match="not a resnet34"):
        weights.load_backbone(tmp_path / "backbone.pt", "resnet34")
    with pytest.raises(common.UserError, match="--arch"):
        weights.load_backbone(tmp_path / "backbone.pt")
    with pytest.raises(common.UserError, match="no checkpoint at"):
        weights.load_backbone(tmp_path / "nothing.pt", arch)
