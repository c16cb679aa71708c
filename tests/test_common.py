"""common.py, shapes.py, weights.py: backbones and colours against torchvision; data and its faults.
"""
import io
import multiprocessing
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from helpers import make_images
from PIL import Image

import common
import shapes
import training

# --- backbones ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", common.ARCHITECTURES)
def test_shapes_of_maps(arch):
    size = 64 if "tiny_" in arch else 128
    with torch.no_grad(), torch.device("meta"):  # shapes without the arithmetic
        backbone = common.build_backbone(arch, size).eval()
        for side in (size, size + backbone.stride):
            grid = side // backbone.stride
            maps, pooled = backbone(torch.randn(2, 3, side, side))
            assert maps.shape == (2, grid * grid, backbone.dim)
            assert pooled.shape == (2, backbone.dim)


@pytest.mark.parametrize("arch", ["tiny_convnet", "resnet18", "convnext_tiny", "tiny_vit"])
def test_stages_end_in_the_maps(arch):
    torch.manual_seed(0)
    backbone = common.build_backbone(arch, 128).eval()
    x = torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        stages = backbone.stages(x)
        maps, _ = backbone(x)
    grid = (64 // backbone.stride, 128 // backbone.stride)
    assert len(stages) == 4 and stages[-1].shape[2:] == grid
    torch.testing.assert_close(stages[-1].flatten(2).mT, maps)
    sides = [stage.shape[2] for stage in stages]
    assert sides == sorted(sides, reverse=True)


def test_small_images_get_the_small_stem():
    backbone = common.build_backbone("resnet18", 32)
    maps, _ = backbone(torch.randn(2, 3, 32, 32))
    assert backbone.stride == 8 and maps.shape == (2, 16, 512)


def test_maps_are_row_major():
    backbone = common.TinyConvNet().eval()
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, :24, 40:] = 5  # the upper right corner
    changed = backbone(x)[0] - backbone(torch.zeros(1, 3, 64, 64))[0]
    changed = changed.square().sum(2).view(8, 8)
    assert changed[:4, 4:].sum() > 0.8 * changed.sum() > 0


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet50_2", "convnext_tiny"])
def test_torchvision_loads_the_weights_and_agrees(arch):
    torch.manual_seed(0)
    ours = common.build_backbone(arch, 224, layer_scale=True).eval()
    theirs = getattr(torchvision.models, arch)(weights=None).eval()
    left = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all(key.startswith(("fc", "classifier.2")) for key in left.missing_keys)
    *_, head = theirs.modules()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(head(ours(x)[1]), theirs(x), rtol=1e-4, atol=1e-5)


def test_convnext_without_layer_scale():
    """As VICRegL has it: torchvision's where each scale is 1, but for the order at the end."""
    torch.manual_seed(0)
    ours = common.build_backbone("convnext_tiny", 224).eval()
    theirs = torchvision.models.convnext_tiny(weights=None).eval()
    assert not any("layer_scale" in name for name in ours.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for name, p in theirs.named_parameters():
        if name.endswith("layer_scale"):
            torch.nn.init.ones_(p)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, pooled = ours(x)
        norm = theirs.classifier[0]
        expected = norm(theirs.features(x)).flatten(2).mT  # (B, N, D)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, maps.mean(1))


def test_residual_branches_start_at_zero():
    backbone = common.build_backbone("resnet50")
    assert all(not m.bn3.weight.any() for m in backbone.modules() if hasattr(m, "bn3"))


def test_vit_is_torchvisions_under_the_names_of_dino():
    ours = common.ViT(48, 2, 4, 8, 32, 0.0).eval()
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 192).eval()
    torch.nn.init.normal_(ours.pos_embed)
    state = ours.state_dict()
    first = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert list(state)[:4] == first
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "norm": "encoder.ln",
    }
    for i in range(2):
        layer = f"encoder.layers.encoder_layer_{i}."
        names[f"blocks.{i}.norm1"] = layer + "ln_1"
        names[f"blocks.{i}.norm2"] = layer + "ln_2"
        names[f"blocks.{i}.attn.qkv"] = layer + "self_attention.in_proj"
        names[f"blocks.{i}.attn.proj"] = layer + "self_attention.out_proj"
        names[f"blocks.{i}.mlp.fc1"] = layer + "mlp.0"
        names[f"blocks.{i}.mlp.fc2"] = layer + "mlp.3"
    renamed = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if key in names:
            name = names[key]
        else:
            name = names[stem] + ("_" if names[stem].endswith("in_proj") else ".") + leaf
        renamed[name] = value
    left = theirs.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys
    assert all(key.startswith("heads") for key in left.missing_keys)
    theirs.heads = torch.nn.Identity()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[1], theirs(x), rtol=1e-4, atol=1e-5)


def test_position_embeddings_follow_the_grid():
    vit = common.ViT(16, 2, 2, 8, 64, 0.0)
    torch.nn.init.normal_(vit.pos_embed)
    assert vit.position_embeddings(8, 8) is vit.pos_embed
    ramp = torch.arange(8.0).repeat(8, 1)  # the column
    vit.pos_embed.data[:, 1:] = ramp.reshape(1, 64, 1)
    wide = vit.position_embeddings(8, 16)[0, 1:].reshape(8, 16, 16)
    assert (wide[:, 1:] > wide[:, :-1]).all()
    assert torch.allclose(wide, wide[:1].expand_as(wide))


@pytest.mark.parametrize("arch,size", [
    ("resnet18", 224), ("resnet18", 32), ("tiny_vit", 48), ("convnext_tiny", 224)])
def test_load_backbone(tmp_path, arch, size):
    weights = pytest.importorskip("weights", exc_type=ImportError)
    backbone = common.build_backbone(arch, size).eval()
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    x = torch.randn(2, 3, 64, 64)
    loaded = weights.load_backbone(tmp_path / "backbone.pt", arch)
    assert torch.equal(loaded(x)[0], backbone(x)[0]) and not loaded.training
    with pytest.raises(common.UserError, match="not a resnet34"):
        weights.load_backbone(tmp_path / "backbone.pt", "resnet34")
    assert weights.load_backbone(tmp_path / "backbone.pt").arch == arch  # by names and shapes
    with pytest.raises(common.UserError, match="no checkpoint at"):
        weights.load_backbone(tmp_path / "nothing.pt", arch)


# --- data -----------------------------------------------------------------------------------------

def test_folders(tmp_path):
    flat = make_images(tmp_path / "flat", 5, classes=0)
    assert len(common.open_data(str(flat))) == 5
    assert not common.open_data(str(flat)).classes
    assert common.open_data(str(flat), "val") is None

    nested = make_images(tmp_path / "nested" / "2021" / "may", 3, classes=0).parents[1]
    make_images(nested / "2022", 2, classes=0)
    (nested / "2021" / "loop").symlink_to(nested)
    assert len(common.open_data(str(nested))) == 5
    assert common.open_data(str(nested)).label(0) == -1

    classes = make_images(tmp_path / "sorted", 6, classes=3)
    data = common.open_data(str(classes))
    assert data.classes == ["class0", "class1", "class2"]
    assert [data.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]

    split = tmp_path / "split"
    make_images(split / "train", 4)
    make_images(split / "test", 2)
    assert len(common.open_data(str(split))) == 4
    assert len(common.open_data(str(split), "val")) == 2
    make_images(split / "valid", 3)
    assert len(common.open_data(str(split), "val")) == 3


def test_a_folder_with_masks_has_its_images_beside_them(tmp_path):
    make_images(tmp_path / "train" / "images", 3, classes=0)
    make_images(tmp_path / "train" / "masks", 3, classes=0)
    data = common.open_data(str(tmp_path))
    assert len(data) == 3 and "/images/" in data.name(0)
    assert len(common.open_data(str(tmp_path / "train"))) == 3
    assert len(common.open_data(str(tmp_path / "train" / "images"))) == 3
    assert len(common.open_data(str(tmp_path / "train" / "masks"))) == 3


def test_a_folder_in_DATA(tmp_path, monkeypatch):
    make_images(tmp_path / "imagenet" / "train", 4)
    monkeypatch.setenv("DATA", str(tmp_path))
    assert len(common.open_data("imagenet")) == 4


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images = {"data": np.full((2, 3072), 7, np.uint8), "labels": [3, 9]}
        (folder / name).write_bytes(pickle.dumps(images))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    train = common.open_data("cifar10")
    assert len(train) == 10 and len(common.open_data("cifar10", "val")) == 2
    assert train.label(1) == 9 and train.load(0).size == (32, 32)


def test_every_kind_of_file_decodes_upright_in_rgb(tmp_path):
    colour = np.zeros((20, 30, 3), np.uint8)
    colour[:, :15] = 255, 0, 0
    image = Image.fromarray(colour)
    gray = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
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
            assert np.abs(pixels[:, :12] - [255, 0, 0]).max() < 40, data.name(i)
            assert pixels[:, 18:].max() < 40, data.name(i)
        elif i < 6:
            assert np.abs(pixels[..., 0] - gray / 257).max() <= 1


def test_floats_and_integers_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 600).reshape(20, 30)
    stored = {
        "a.tif": ramp.astype(np.float32),
        "b.tif": (255 * ramp).astype(np.float32),
        "c.tif": (255 * ramp).astype(np.int32),
        "d.tif": (65535 * ramp).astype(np.int32),
    }
    for name, pixels in stored.items():
        Image.fromarray(pixels).save(tmp_path / name)
    data = common.open_data(str(tmp_path))
    for i in range(len(stored)):
        pixels = np.asarray(data.load(i)).astype(float)
        assert pixels.shape == (20, 30, 3)
        assert np.abs(pixels[..., 0] - 255 * ramp).max() < 2, data.name(i)


def test_names_with_a_dot_are_no_images(tmp_path):
    folder = make_images(tmp_path / "train", 4)
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0000.jpg", "class0/._0000.jpg"):
        shutil.copy(folder / "class0" / "0000.jpg", folder / name)
    data = common.open_data(str(tmp_path))
    assert len(data) == 4 and data.classes == ["class0", "class1"]


def test_shapes_are_deterministic_at_any_size():
    a = shapes.Shapes("train", 96)
    b = shapes.Shapes("train", 96)
    val = shapes.Shapes("val", 96)
    assert np.array_equal(a.scene(7)[0], b.scene(7)[0])
    assert not np.array_equal(a.scene(7)[0], a.scene(8)[0])
    assert not np.array_equal(a.scene(7)[0], val.scene(7)[0])
    for size in (32, 100, 224):
        image, mask = shapes.Shapes("train", size).scene(5)
        assert image.shape == (size, size, 3) and mask.shape == (size, size)

    ground = []
    for i in range(200):
        image, mask = a.scene(i)
        assert set(np.unique(mask)) == {0, 1 + a.label(i)}
        assert (image == image[:, :, :1]).all()  # gray
        ground.append((mask == 0).mean())
    assert 0.5 < np.mean(ground) < 0.9
    assert set(range(12)) == {a.label(i) for i in range(200)}


def test_raw_pixels_tell_little_of_the_class_of_a_scene():
    def raw(split, count):
        data = shapes.Shapes(split, 64)
        x = torch.tensor(np.stack([data.scene(i)[0] for i in range(count)]))
        x = common.normalize(x.permute(0, 3, 1, 2) / 255).flatten(1)
        return F.normalize(x, dim=1), torch.tensor([data.label(i) for i in range(count)])

    x, y = raw("train", 1500)
    queries, targets = raw("val", 500)
    neighbours = y[(queries @ x.T).topk(20).indices]  # (500, 20)
    votes = F.one_hot(neighbours, 12).sum(1).argmax(1)
    assert (votes == targets).float().mean() < 0.25  # chance 0.08, after training 0.4 to 0.6


# --- views ----------------------------------------------------------------------------------------

def coordinates(height, width):
    """An image whose red is its column and green its row, in pixels."""
    y, x = np.mgrid[0:height, 0:width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, 0 * x], 2))


BOXES = [(0, 0, 200, 240), (31, 77, 64, 64), (10, 20, 150, 90), (0, 0, 16, 16), (180, 224, 20, 16)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("flip", [False, True])
def test_a_view_shows_its_box(box, flip):
    size = 32
    top, left, height, width = box
    view = common.cut(coordinates(200, 240), box, flip, size).float()
    x = left + (torch.arange(size) + 0.5) * width / size - 0.5  # what a column's centre shows
    y = top + (torch.arange(size) + 0.5) * height / size - 0.5
    x = x.flip(0) if flip else x
    inner = slice(2, -2)  # at the border there is less to average over
    assert (view[0] - x)[inner, inner].abs().max() < 1
    assert (view[1] - y[:, None])[inner, inner].abs().max() < 1


def test_batches_start_anywhere_and_split_over_processes():
    everything = list(common.Batches(103, 20, 0, 12, seed=3))
    assert len(everything) == 12 and all(len(batch) == 20 for batch in everything)
    assert list(common.Batches(103, 20, 7, 12, seed=3)) == everything[7:]
    for epoch in range(2):
        batches = everything[5 * epoch:5 * epoch + 5]
        keys = [key for batch in batches for key in batch]
        assert len({index for _, index in keys}) == 100 and {e for e, _ in keys} == {epoch}
    assert everything[0] != list(common.Batches(103, 20, 0, 1, seed=4))[0]
    shares = [list(common.Batches(103, 20, 0, 12, 3, rank, 4)) for rank in range(4)]
    for whole, *parts in zip(everything, *shares):
        assert all(len(part) == 5 for part in parts)
        assert sorted(sum(parts, [])) == sorted(whole)


def two_views(image):
    tops = torch.randint(0, 9, (2,)).tolist()
    return [((top, 4, 32, 24), torch.rand(()).item() < 0.5, 16) for top in tops]


def one_view(image):
    return [((0, 0, image.height, image.width), False, 16)]


def test_views_are_a_function_of_seed_epoch_and_index(tmp_path):
    data = common.open_data(str(make_images(tmp_path, 20)))
    order = list(common.Batches(20, 4, 0, 7, seed=0))
    views = common.Views(data, two_views, 5)
    loaders = [torch.utils.data.DataLoader(views, batch_sampler=order, num_workers=n)
               for n in (0, 2)]
    runs = [list(loader) for loader in loaders]
    for ours, theirs in zip(*runs):
        assert all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views))
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:]))
    first = runs[0][0]
    assert first.boxes.shape == (4, 2, 4) and first.flips.shape == (4, 2)
    assert first.broken.dtype == torch.bool and not first.broken.any()
    assert first.sizes.tolist() == 4 * [[40, 48]]

    def drawn(seed, epoch):
        samples = [common.Views(data, two_views, seed)[epoch, i] for i in range(20)]
        return torch.stack([sample.boxes for sample in samples])

    assert torch.equal(drawn(5, 1), drawn(5, 1))
    assert not torch.equal(drawn(5, 1), drawn(5, 2)) and not torch.equal(drawn(5, 1), drawn(6, 1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(5, 1)
    assert torch.equal(torch.get_rng_state(), before)


# --- colours --------------------------------------------------------------------------------------

JITTER = [("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2), ("hue", -0.5, 0.5)]


@pytest.mark.parametrize("number", range(4))
def test_jitter_is_torchvisions(number):
    name, low, high = JITTER[number]
    torch.manual_seed(0)
    x = torch.rand(16, 3, 20, 24)
    x[0] = 0.5  # grey and saturated colours have no hue of their own
    x[1] = (x[1] > 0.5).float()
    factor = torch.linspace(low, high, 16)
    rest = 1 - factor
    weights = torch.stack([factor, rest * (number == 1), rest * (number == 2)], 1)
    ours = common.blend(x, weights)
    if name == "hue":
        ours = common.adjust_hue(x, factor)
    adjust = getattr(TF, f"adjust_{name}")
    theirs = torch.stack([adjust(image, f.item()) for image, f in zip(x, factor)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(64, 64), (30, 48), (12, 12)])
def test_blur_is_torchvisions(size):
    x = torch.rand(8, 3, *size)
    sigma = torch.linspace(0.1, 2, 8)
    blurred = [TF.gaussian_blur(image, [23, 23], [s.item()] * 2) for image, s in zip(x, sigma)]
    ours = common.gaussian_blur(x, sigma)
    torch.testing.assert_close(ours, torch.stack(blurred), rtol=0, atol=1e-5)


def test_grayscale_solarize_normalize_are_torchvisions():
    x = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    theirs = TF.normalize(TF.solarize(TF.rgb_to_grayscale(x / 255, 3), 0.5), mean, std)
    ours = common.Photometric(jitter_p=0, gray_p=1, solarize_p=1)(x)
    torch.testing.assert_close(ours, theirs)


def test_photometric_draws_once_a_sample():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(400, -1, -1, -1)
    plain = common.normalize(x.float() / 255)

    def changed(**options):
        torch.manual_seed(1)
        y = common.Photometric(**{"jitter_p": 0, "gray_p": 0, **options})(x)
        return (y - plain).abs().amax((1, 2, 3)) > 1e-6, y

    assert not changed()[0].any() and changed(blur_p=1.0)[0].float().mean() > 0.95
    for option in ("gray_p", "blur_p", "solarize_p"):
        assert 0.2 < changed(**{option: 0.3})[0].float().mean() < 0.4
    jitter = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8)
    some, y = changed(**jitter)
    assert 0.7 < some.float().mean() < 0.9
    assert len(y[some].flatten(1).unique(dim=0)) == some.sum()  # each its own factors
    assert torch.equal(y, changed(**jitter)[1])


def test_blur_is_in_proportion_to_the_size(monkeypatch):
    seen = []

    def note(x, sigma):
        seen.append(sigma)
        return x

    monkeypatch.setattr(common, "gaussian_blur", note)
    for size in (224, 56):  # also for multicrop's small views: the field says the whole ones' size
        torch.manual_seed(0)
        common.Photometric(blur_p=1, size=size)(torch.zeros(2000, 3, 2, 2).byte())
    sigma = torch.cat(seen).view(2, -1)
    assert 0.1 <= sigma[0].min() < 0.11 and 1.99 < sigma[0].max() <= 2  # the papers' at 224
    torch.testing.assert_close(sigma[1], sigma[0] / 4)


STRENGTHS = (0.4, 0.3, 0.2, 0.1)  # of brightness, contrast, saturation, hue


def jitter_of(n):
    """What draw(n) draws first after torch.manual_seed(0): the order and the change by each."""
    torch.manual_seed(0)
    torch.rand(n)
    order = torch.rand(n, 4).argsort(1)
    return order, torch.tensor(STRENGTHS) * (2 * torch.rand(n, 4) - 1)


def test_jitter_draws_colorjitters_range_in_random_order():
    order, change = jitter_of(2000)
    torch.manual_seed(0)
    steps = common.Photometric(STRENGTHS).draw(2000)
    own = torch.stack([steps[k][2][:, 0] for k in (0, 1, 2)], 1)  # weights at the first places
    torch.testing.assert_close(own, (1 + change.gather(1, order))[:, :3])
    torch.testing.assert_close(steps[3][2], change[:, 3])
    for number, strength in enumerate(STRENGTHS):
        assert -strength <= change[:, number].min() < -0.98 * strength
        assert 0.98 * strength < change[:, number].max() <= strength
        places = torch.bincount((order == number).nonzero()[:, 1], minlength=4)
        assert places.sum() == 2000 and places.min() > 400 and places.max() < 600


def test_jitter_is_in_the_order_drawn():
    """Against torchvision, one image at a time, in all 24 orders."""
    n = 200
    x = torch.randint(0, 256, (n, 3, 12, 12), dtype=torch.uint8)
    order, change = jitter_of(n)
    assert len(order.unique(dim=0)) == 24
    theirs = x.float() / 255
    for i in range(n):
        for number in order[i].tolist():
            name, *_ = JITTER[number]
            factor = change[i, number].item() + (name != "hue")
            theirs[i] = getattr(TF, f"adjust_{name}")(theirs[i], factor)
    torch.manual_seed(0)
    ours = common.Photometric(STRENGTHS, jitter_p=1, gray_p=0)(x)
    torch.testing.assert_close(ours, common.normalize(theirs), rtol=0, atol=1e-4)


def test_views_are_recoloured_as_if_alone():
    colours = [common.Photometric((0.4, 0.4, 0.2, 0.1), blur_p=p, solarize_p=p) for p in (0, 1, 0)]
    views = [torch.randint(0, 256, (5, 3, s, s), dtype=torch.uint8) for s in (16, 16, 12)]
    torch.manual_seed(0)
    together = common.recolour(colours, views)
    torch.manual_seed(0)
    for view, colour, ours in zip(views, colours, together, strict=True):
        assert torch.equal(colour(view), ours)


# --- strange files --------------------------------------------------------------------------------

def _png(width, height):
    """The head of a PNG that claims to be so large: Pillow knows it before it reads a pixel."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_strange_files(tmp_path, capsys):
    folder = tmp_path / os.fsdecode("картины 画 \udcff".encode(errors="surrogateescape"))
    make_images(folder, 3, classes=0)
    bytes_name = os.fsdecode(b"\xff\xfe.jpg")
    for name in ("łódź.jpg", "写真.jpg", "a\nb.jpg", bytes_name, "-rf.jpg", "$(touch x).jpg"):
        shutil.copy(folder / "0000.jpg", folder / name)
    bad = {
        "bomb.png": "10000 x 9000 pixels",
        "large.webp": "9400 x 9400 pixels",
        "script.jpg": "cannot identify",
        "larger.png": "decompression bomb",
        "loop.jpg": "symbolic link",
        "pipe.jpg": "regular",
        "empty.jpg": "cannot identify",
        "gone.jpg": "No such file",
        "a\nbroken.jpg": "cannot identify",
    }
    (folder / "bomb.png").write_bytes(_png(10_000, 9_000))
    Image.new("RGB", (9400, 9400)).save(folder / "large.webp", method=0)
    (folder / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "larger.png").write_bytes(_png(20_000, 10_000))
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "a\nbroken.jpg").write_bytes(b"\xff\xd8 no image")
    for size in ((1, 20_000), (20_000, 1)):
        Image.new("RGB", size).save(folder / f"thin{size[0]}.png")
    data = common.open_data(str(folder))
    assert len(data) == 3 + 6 + len(bad) + 2

    views = common.Views(data, one_view, 0)
    for index in range(len(data)):
        name = Path(data.name(index)).name
        sample = views[0, index]
        assert sample.broken == (name in bad), name
        assert sample.views[0].shape == (3, 16, 16)
        said = capsys.readouterr().err.splitlines()
        if name not in bad:
            assert not said
            continue
        assert all(line.startswith("warning: ") for line in said)  # next ones may be broken too
        assert training.printable(name) in said[0] and bad[name] in said[0], said
        said[0].encode(errors="strict")


def test_where_nothing_can_be_read_the_image_is_black(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    sample = common.Views(common.open_data(str(tmp_path)), one_view, 0)[0, 3]
    assert sample.broken and not sample.views[0].any() and sample.labels == -1
    assert capsys.readouterr().err.count("cannot read") == 10


def _as_nobody(folder):
    """Run by a process that may not read everything: root may."""
    if os.geteuid() == 0:
        os.setuid(65534)
    closed = common.Images([Path(folder) / "closed.jpg"])
    broken = common.Views(closed, one_view, 0)[0, 0].broken
    try:
        common.open_data(folder)
    except common.UserError as error:
        said = str(error)
        os._exit(0 if "cannot list" in said and "closed" in said and broken else 2)
    os._exit(1)


def test_unreadable_files_and_folders_are_reported():
    with tempfile.TemporaryDirectory() as folder:  # not under pytest's own, closed to others
        os.chmod(folder, 0o755)
        make_images(Path(folder) / "closed", 2, classes=0)
        make_images(Path(folder), 2, classes=0)
        shutil.copy(Path(folder) / "0000.jpg", Path(folder) / "closed.jpg")
        for name in ("closed", "closed.jpg"):
            os.chmod(Path(folder) / name, 0)
        child = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(folder,))
        child.start()
        child.join(60)
        os.chmod(Path(folder) / "closed", 0o755)
        assert child.exitcode == 0
