"""evaluate.py: each protocol against brute force, on one and on two processes."""
import argparse
import json
import os
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from helpers import make_images, on_processes, script, user_error
from PIL import Image

import bagssl
import common
import evaluate
import shapes
import weights


def blobs(n, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(7))
    return centres[labels] + 0.9 * torch.randn(n, 16, generator=g), labels


@pytest.mark.parametrize("chunk", [3, 50, 1000])
def test_nearest_is_brute_force(chunk):
    (x, y), (queries, _) = blobs(200), blobs(40, seed=1)
    similarity, labels = evaluate.nearest(queries, zip(x.split(chunk), y.split(chunk)), 20)
    for q, s, found in zip(queries, similarity, labels):
        cosine = np.array([(q @ row / q.norm() / row.norm()).item() for row in x])
        order = np.argsort(-cosine)[:20]
        np.testing.assert_allclose(s, cosine[order], atol=1e-5)
        assert found.tolist() == y[order].tolist()


def test_fewer_rows_than_k():
    x, y = blobs(7)
    similarity, labels = evaluate.nearest(x, [(x, y)], 20)
    assert (similarity[:, 7:] == -torch.inf).all() and (labels[:, 7:] == -1).all()
    for temperature in (None, 0.07):
        predicted = evaluate.vote(similarity, labels, 5, temperature)
        assert torch.isin(predicted, y).all()


def test_votes():
    similarity = torch.tensor([[0.9, 0.5, 0.5, -torch.inf]])
    labels = torch.tensor([[2, 1, 1, -1]])
    assert evaluate.vote(similarity, labels, 3).item() == 1  # the majority
    assert evaluate.vote(similarity, labels, 3, 0.07).item() == 2  # the nearest weighs exp(0.4 / 0.07) times as much


class Means(torch.nn.Module):
    """A backbone whose representation is the image's mean colour: class folders of one colour are told apart by it."""

    dim = 3

    def forward(self, x):
        return None, x.mean((2, 3))


def coloured(folder, count, seed):
    rng = np.random.default_rng(seed)
    for i, colour in enumerate(((220, 30, 30), (30, 220, 30), (30, 30, 220))):
        (folder / f"class{i}").mkdir(parents=True)
        for j in range(count):
            pixels = rng.normal(colour, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{i}" / f"{j}.png")
    return folder


def test_center_view():
    assert evaluate.center_view(None, 256, 512, 224) == [((16, 144, 224, 224), False, 224)]
    assert evaluate.center_view(None, 32, 40, 32) == [((0, 4, 32, 32), False, 32)]


def test_command_line(tmp_path):
    coloured(tmp_path / "data" / "train", 9, 0)
    coloured(tmp_path / "data" / "val", 5, 1)
    torch.save(common.build_backbone("tiny_convnet").state_dict(), tmp_path / "backbone.pt")
    done = script("evaluate.py", "knn", "--checkpoint", tmp_path / "backbone.pt", "--arch", "tiny_convnet", "--size", 32,
                  "--data", tmp_path / "data", torchrun=2)
    assert done.returncode == 0 and done.stdout.count("20-NN weighted") == 1, done.stderr
    table = json.loads((tmp_path / "knn.json").read_text())
    row = next(iter(next(iter(table.values())).values()))
    assert set(row) == {"20-NN", "20-NN weighted", "200-NN", "200-NN weighted"} and 0 <= row["20-NN"] <= 100


@pytest.mark.parametrize("args,word", [
    (["--checkpoint", "nowhere", "--arch", "tiny_convnet"], "no checkpoint at nowhere"),
    (["--checkpoint", "backbone.pt", "--arch", "resnet18"], "not a resnet18"),
    (["--checkpoint", "random"], "--arch"),
    (["--checkpoint", "backbone.pt", "--arch", "tiny_convnet", "--data", "flat"], "knn needs labels"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, args, word):
    monkeypatch.chdir(tmp_path)
    torch.save(common.build_backbone("tiny_convnet").state_dict(), "backbone.pt")
    make_images(tmp_path / "flat", 4, classes=0)
    assert word in user_error(evaluate.main, monkeypatch, capsys, "knn", "--workers", 0, "--size", 32, *args)


@pytest.mark.parametrize("command,length,column", [
    ("knn", 60, "20-NN"), ("linear --epochs 1 --batch-size 16", 60, "top-1"), ("fewshot", 300, "accuracy"),
    ("linear --finetune --labels 0.1 --epochs 1 --batch-size 4", 60, "top-1"), ("segment --steps 2", 20, "mIoU"),
    ("retrieve --subsample 1 4", 8, "mIoU"), ("correspond", 20, "flip"),
    ("bag --bags 1 4 --epochs 1 --batch-size 16", 60, "20-NN"),
])
def test_every_protocol_on_shapes(tmp_path, monkeypatch, capsys, command, length, column):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes.Shapes, "__len__", lambda self: length)
    flags = "--checkpoint random --arch tiny_convnet --size 32 --workers 0"
    monkeypatch.setattr(sys, "argv", f"evaluate.py {command} {flags}".split())
    evaluate.main()
    name = command.split()[0]
    (title, rows), = json.loads((tmp_path / f"{name}.json").read_text()).items()
    assert title.startswith(f"{name} of random on shapes") and title in capsys.readouterr().out
    assert all(0 <= row[column] <= 100 for row in rows.values())


@pytest.mark.parametrize("flags,words", [
    ("linear --finetune", "go together"), ("linear --labels 0.1", "go together"),
    ("linear --batch-size 99999", "at most the 10000 training images"),
    ("bag --bags 4 8", "squares"), ("bag --bags 0", "squares"), ("bag --patch-scale 1.5", "share of the area"),
])
def test_flags_that_cannot_be(monkeypatch, capsys, flags, words):
    args = f"{flags} --checkpoint random --arch tiny_convnet --size 32 --workers 0".split()
    assert words in user_error(evaluate.main, monkeypatch, capsys, *args)


@pytest.mark.parametrize("extra", [{"0.weight": torch.zeros(8, 256), "0.bias": torch.zeros(8)},
                                   {"conv.weight": torch.zeros(8, 256, 1, 1)}, {"layer1.weight": torch.zeros(8, 256)}])
def test_a_projector_of_another_build(tmp_path, monkeypatch, capsys, extra):
    state = prefixed(common.build_backbone("tiny_convnet", 32).state_dict(), "backbone.") | prefixed(extra, "projector.")
    torch.save({"model": state, "args": {"arch": "tiny_convnet", "size": 32}}, tmp_path / "last.pt")
    said = user_error(evaluate.main, monkeypatch, capsys, "bag", "--checkpoint", tmp_path, "--workers", 0)
    assert "its projector" in said and "backbone" in said


def test_bag_of_a_run(tmp_path, monkeypatch, capsys):
    """Against patches cut one by one, with the scale, the size and the projector of the run."""
    for split, count in (("train", 9), ("val", 5)):
        coloured(tmp_path / "data" / split, count, 0)
    torch.manual_seed(0)
    model = bagssl.BagSSL(common.build_backbone("tiny_convnet", 16), (8, 5)).eval()
    flags = dict(arch="tiny_convnet", size=16, patch_scale="0.25", data=str(tmp_path / "data"), bf16=False)
    torch.save({"model": model.state_dict(), "args": flags}, tmp_path / "last.pt")
    command = f"evaluate.py bag --checkpoint {tmp_path} --bags 1 4 --workers 0 --batch-size 9"
    monkeypatch.setattr(sys, "argv", command.split())
    evaluate.main()
    (title, found), = json.loads((tmp_path / "bag.json").read_text()).items()
    assert "patch_scale 0.25" in title and list(found)[:2] == ["whole image", "local aggregation"]
    corners = {1: [(8, 8)], 4: [(0, 0), (0, 16), (16, 0), (16, 16)]}  # of patches of 16 in an image of 32

    def features(split, count, layer):
        rows, labels, data = [], [], common.open_data(str(tmp_path / "data"), split)
        for i in range(len(data)):
            whole = evaluate.to_input(common.cut(data.load(i), (0, 0, 20, 20), False, 32)[None], "cpu")
            patches = torch.cat([whole[:, :, y:y + 16, x:x + 16] for y, x in corners[count]])
            rows.append(layer(model.backbone(patches)[1]).mean(0))
            labels.append(data.label(i))
        return torch.stack(rows).detach(), torch.tensor(labels)

    for count in corners:
        for name, layer in (("", torch.nn.Identity()), (", after the projector", model.projector)):
            (y, labels), (queries, targets) = (features(split, count, layer) for split in ("train", "val"))
            predicted = evaluate.vote(*evaluate.nearest(queries, [(y, labels)], 20), 3)
            expected = 100 * (predicted == targets).double().mean().item()
            assert found[f"bag of {count}{name}"]["20-NN"] == pytest.approx(expected)


# --- dense protocols -----------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
ARGS = dict(size=32, workers=0, bf16=False, data="data", checkpoint="c", finetune=False, labels=None, epochs=2, batch_size=4,
            augment=True, head="linear", layers=1, lr=[0.5, 0.05], steps=60, subsample=[1, 2], chunk=3)


def striped(root, count, seed, split="train", mode="L"):
    """Images of upright bands, 8 pixels wide, black, red, green or blue by class (all 4 in each image), and masks of them
    with two rows of void."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True)
    for i in range(count):
        bands = np.append(rng.permutation(4), rng.integers(4)).astype(np.uint8)
        mask = bands.repeat(8)[None].repeat(32, 0)
        Image.fromarray(255 * np.eye(4, dtype=np.uint8)[mask][..., 1:]).save(root / split / "images" / f"{i}.png")
        mask[:2] = 255
        saved = Image.fromarray(mask)
        if mode == "P":
            saved.putpalette(list(range(256)) * 3)
        saved.save(root / split / "masks" / f"{i}.png")
    return root


class Oracle(torch.nn.Module):
    """A backbone whose local features are the one-hot class of striped(), or the mixture of classes in the patch."""

    dim, stride, classes = 4, 8, 4

    def stages(self, x):
        black = common.normalize(torch.zeros(1, 3, 1, 1))
        colour = torch.nn.functional.avg_pool2d((x - black) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), 8)
        return [torch.cat([1 - colour.sum(1, keepdim=True), colour], 1)]  # (B, 4, H/8, W/8)

    def forward(self, x):
        maps = self.stages(x)[-1]
        return maps.flatten(2).mT, maps.mean((2, 3))


class Noise(Oracle):
    """Features that know nothing of the image."""

    def stages(self, x):
        return [torch.randn(len(x), 4, x.shape[2] // 8, x.shape[3] // 8)]


class Conv(Oracle):
    """Features that know something: a fixed random projection of each patch."""

    dim = 6

    def stages(self, x):
        weight = 0.05 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        return [torch.nn.functional.conv2d(x, weight, stride=8)]


def test_mean_iou():
    mask, predicted = torch.tensor([[0, 0, 1, 1, -1, 3]]), torch.tensor([[0, 1, 1, 2, 0, 3]])
    counts = evaluate.confusion(predicted, mask, 5)
    assert counts.sum() == 5  # void is ignored
    # class 0: 1 of 2; class 1: 1 of 3; class 3: 1 of 1; classes 2 and 4 do not occur in the mask
    assert evaluate.mean_iou(counts) == pytest.approx(100 * (1 / 2 + 1 / 3 + 1) / 3)


def test_majority_of_a_patch():
    mask = torch.tensor([[0, 0, 2, -1], [0, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, 1, 0]])
    assert evaluate.majority(mask, 2, 2, 3).tolist() == [0, 2, -1, 1]
    assert evaluate.cells(torch.zeros(3, 4), 1, 2).tolist() == 3 * [[0, 0, 1, 1]]


@pytest.fixture
def bands(tmp_path):
    return str(striped(striped(tmp_path / "bands", 8, 0, mode="P"), 5, 1, split="val"))


def test_oracle_and_random_features(bands):
    data = evaluate.open_masks(bands, 32)
    assert [len(part) for part in data] == [8, 5] and data[0].num_classes == data[1].num_classes == 4
    args = SimpleNamespace(**{**ARGS, "lr": [10, 0.5]})
    for backbone, low, high in ((Oracle(), 99.9, 100), (Noise(), 0, 35)):
        torch.manual_seed(0)
        args.steps = 60 if high == 100 else 5
        found = evaluate.retrieve(backbone, *data, args, CPU, k=5)
        assert low <= found["1/1 of the images"]["mIoU"] <= high and low <= found["1/2 of the images"]["mIoU"] <= high
        found = evaluate.segment(backbone, *data, args, CPU)
        assert set(found) == {"lr 10", "lr 0.5", "best"} and low <= found["best"]["mIoU"] <= high


def test_retrieve_is_brute_force(bands):
    train, val = evaluate.open_masks(bands, 32)
    rows, labels = [], []
    for i in range(len(train)):
        (image, mask), backbone = train.pair(i), Conv()
        maps = backbone.stages(evaluate.to_input(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], CPU))[0]
        mask = np.array(mask)
        for y in range(4):
            for x in range(5):
                ids = [v for v in mask[8 * y:8 * y + 8, 8 * x:8 * x + 8].flatten() if v != 255]
                rows.append(maps[0, :, y, x])
                labels.append(max(set(ids), key=ids.count))
    inter, union, seen = np.zeros(4), np.zeros(4), set()
    for i in range(len(val)):
        image, mask = val.pair(i)
        maps = backbone.stages(evaluate.to_input(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], CPU))[0]
        mask, predicted = np.array(mask), np.zeros((32, 40), int)
        for y in range(4):
            for x in range(5):
                cosine = torch.cosine_similarity(torch.stack(rows), maps[:, :, y, x], 1)
                predicted[8 * y:8 * y + 8, 8 * x:8 * x + 8] = labels[cosine.argmax()]
        for c in range(4):
            a, b = (predicted == c) & (mask != 255), mask == c
            inter[c] += (a & b).sum()
            union[c] += (a | b).sum()
            seen |= {c} if b.any() else set()
    expected = 100 * np.mean([inter[c] / union[c] for c in seen])
    for chunk in (2, 100):
        found = evaluate.retrieve(Conv(), train, val, SimpleNamespace(**{**ARGS, "chunk": chunk}), CPU, k=1)
        assert found["1/1 of the images"]["mIoU"] == pytest.approx(expected)


def test_correspond(monkeypatch):
    data = common.open_data("shapes", "val", 64)
    data.length = 6

    class Pixels(Oracle):  # the mean colour of a cell: the flip is found where the colours hold
        def stages(self, x):
            return [torch.nn.functional.avg_pool2d(x, 8)]
    found = evaluate.correspond(Pixels(), data, SimpleNamespace(**{**ARGS, "size": 64}), CPU)["c"]
    assert found["flip"] > 2 * found["chance"] and found["location = feature"] > 2 * found["chance"] == 2 * 100 / 64
    monkeypatch.setattr(common, "Photometric", lambda **_: lambda x, generator: common.normalize(x.float() / 255))
    assert evaluate.correspond(Pixels(), data, SimpleNamespace(**ARGS), CPU)["c"]["flip"] == 100
    y, x = np.mgrid[:256, :256]  # an image whose colour tells the place: the feature's match is that of the location
    place = common.Images(np.stack([np.stack([y, x, 0 * x], 2)] * 20).astype(np.uint8))
    assert evaluate.correspond(Pixels(), place, SimpleNamespace(**{**ARGS, "size": 64}), CPU)["c"]["location = feature"] > 97


def test_logistic_regression_is_at_its_optimum():
    torch.manual_seed(0)
    x, queries = torch.randn(2, 25, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    x, y = x / x.norm(dim=2, keepdim=True), torch.eye(5, dtype=torch.float64).repeat_interleave(5, 0)
    found = evaluate.logistic_regression(x, y, queries)
    for i in range(2):
        w, b = (torch.zeros(n, 5, dtype=torch.float64, requires_grad=True) for n in (8, 1))
        solver = torch.optim.LBFGS([w, b], max_iter=100, tolerance_grad=1e-8, tolerance_change=1e-12)

        def loss(w=w, b=b, x=x[i]):
            value = torch.nn.functional.cross_entropy(x @ w + b, y, reduction="sum") + w.square().sum() / 2
            solver.zero_grad()  # noqa: B023
            value.backward()
            return value
        solver.step(loss)
        torch.testing.assert_close(found[i], (queries[i] @ w + b).detach(), atol=1e-5, rtol=1e-5)


def _protocols(rank, world, classes, bands):
    data = [common.open_data(classes, split) for split in ("train", "val")]
    masks = evaluate.open_masks(bands, 32)
    args, cached = SimpleNamespace(**ARGS), SimpleNamespace(**{**ARGS, "augment": False, "lr": [10]})
    found = [evaluate.knn(Means(), *data, 16, CPU, ks=(1, 5))]
    found += [evaluate.linear(Means(), *data, each, CPU) for each in (args, cached)]
    found += [evaluate.segment(Conv(), *masks, args, CPU), evaluate.retrieve(Conv(), *masks, args, CPU, k=3)]
    found += [evaluate.correspond(Conv(), masks[1].images, args, CPU, batch_size=2)]
    bags = SimpleNamespace(**{**ARGS, "checkpoint": "random", "bags": [1, 4], "patch_scale": 0.05, "lr": [10]})
    found += [evaluate.bag(Conv(), *data, bags, CPU)]
    return found + [evaluate.fewshot(Means(), data[0], args, CPU, ways=3, shots=2, queries=3, episodes=120)]


def test_two_processes_find_the_same_as_one(tmp_path, bands):
    coloured(tmp_path / "data" / "train", 9, 0)
    coloured(tmp_path / "data" / "val", 5, 1)
    (tmp_path / "data" / "val" / "class0" / "broken.png").write_bytes(b"not an image")
    one = _protocols(0, 1, str(tmp_path / "data"), bands)
    assert set(one[0]) == {"1-NN", "1-NN weighted", "5-NN", "5-NN weighted"} and one[0]["5-NN"] == 100
    assert one[1]["best"]["top-1"] > 60 and one[2]["lr 10"]["top-1"] > 90 and one[7]["c"]["accuracy"] > 90
    for two in on_processes(2, tmp_path / "group", _protocols, str(tmp_path / "data"), bands):
        for mine, theirs in zip(one, two):
            for row in mine if "1-NN" not in mine and "whole image" not in mine else []:
                assert theirs[row] == pytest.approx(mine[row], abs=0.2), row
        assert two[0] == one[0] and two[4] == one[4] and two[7] == one[7]
        assert all(two[6][row]["20-NN"] == one[6][row]["20-NN"] for row in one[6])


def test_finetuning_and_heads(tmp_path, bands):
    coloured(tmp_path / "data" / "train", 12, 0)
    coloured(tmp_path / "data" / "val", 4, 1)
    data = [common.open_data(str(tmp_path / "data"), split) for split in ("train", "val")]
    assert len(evaluate.few_labels(data[0], 0.25)) == 9 and len(evaluate.few_labels(data[0], 0.01)) == 3
    backbone = common.build_backbone("tiny_convnet")
    before = backbone[0].weight.clone()
    args = SimpleNamespace(**{**ARGS, "finetune": True, "labels": 0.1, "batch_size": 3})
    found = evaluate.linear(backbone, *data, args, CPU)
    assert found["lr 0.1"]["top-1"] >= 0 and not torch.equal(before, backbone[0].weight)
    masks = evaluate.open_masks(bands, 32)
    for arch, flags in (("tiny_vit", dict(layers=4)), ("tiny_convnet", dict(layers=4, head="fcn", finetune=True)),
                        ("resnet18", dict())):
        backbone = common.build_backbone(arch)
        before = [p.clone() for p in backbone.parameters()]
        args = SimpleNamespace(**{**ARGS, "steps": 2, "lr": None if arch == "tiny_vit" else [0.1], **flags})
        found = evaluate.segment(backbone, *masks, args, CPU)
        assert all(0 <= row["mIoU"] <= 100 for row in found.values()) and ("lr 0.0008" in found) == (arch == "tiny_vit")
        assert all(torch.equal(p, q) for p, q in zip(before, backbone.parameters()))  # each rate starts from the same


def test_stages(monkeypatch):
    monkeypatch.setitem(common.CONVNEXTS, "convnext_tiny", ((8, 16, 24, 32), (1, 1, 2, 1)))
    x = torch.randn(1, 3, 64, 96)
    for arch in ("tiny_convnet", "resnet18", "convnext_tiny", "tiny_vit"):
        backbone = common.build_backbone(arch).eval()
        with torch.no_grad():
            maps, stages = backbone(x)[0], backbone.stages(x)
        assert len(stages) == 4 and torch.equal(stages[-1].flatten(2).mT, maps), arch
    resnet = common.build_backbone("resnet18").eval()
    before = resnet.stages(x)[-1]
    evaluate.dilate(resnet)
    assert resnet.stages(x)[-1].shape == (1, 512, 4, 6) and resnet.stride == 16
    torch.testing.assert_close(resnet.stages(x)[-1][..., ::2, ::2], before)  # the same function, at more places
    assert evaluate.local_features(resnet, x, 4).shape == (1, 64 + 128 + 256 + 512, 16, 24)


# --- masks ---------------------------------------------------------------------------------------------------------


def test_the_run_gives_data_and_size_and_nothing_else(tmp_path):
    flags = dict(arch="tiny_vit", data="cifar10", size=32, bf16=True, epochs=9)
    torch.save({"model": prefixed(common.build_backbone("tiny_vit", 32).state_dict(), "backbone."), "args": flags},
               tmp_path / "last.pt")
    args = dict(checkpoint=str(tmp_path), protocol="linear", data=None, size=48, bf16=None, arch=None, epochs=None)
    args = SimpleNamespace(**args)
    backbone, path = evaluate.load(args)
    assert (args.data, args.size, args.bf16, args.epochs, path) == ("cifar10", 48, True, None, tmp_path / "linear.json")
    assert backbone.pos_embed.shape == (1, 17, 128)


def test_layouts_of_masks(tmp_path):
    for kind, split in (("images", "training"), ("images", "validation"), ("annotations", "training"),
                        ("annotations", "validation")):
        (tmp_path / kind / split).mkdir(parents=True)
        Image.fromarray(np.array([[0, 1, 150]], np.uint8)).save(tmp_path / kind / split / "ADE_1.png")
    train, val = evaluate.open_masks(str(tmp_path), 64)
    assert train.num_classes == val.num_classes == 150
    assert evaluate.targets(train.pair(0)[1]).tolist() == [[-1, 0, 149]]
    shapes = evaluate.open_masks("shapes", 64)[1]
    image, mask = shapes.pair(3)
    assert image.size == mask.size == (96, 96) and np.array(mask).max() < shapes.num_classes == 13


def test_crops_keep_image_and_mask_together(bands):
    crops = evaluate.Crops(evaluate.open_masks(bands, 32)[0], 32)
    for epoch in range(4):
        image, mask = crops[epoch, 0]
        inner = mask >= 0
        black = 255 - image.float().sum(0, keepdim=True)
        right = torch.cat([black, image]).argmax(0)[inner] == mask[inner]  # but where bicubic resizing blurs the bands
        assert right.float().mean() > 0.95 and torch.equal(image, crops[epoch, 0][0])


def _save(array, path):
    Image.fromarray(np.array(array, np.uint8)).save(path)


def _halve(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize("name,spoil,words", [
    ("size", lambda d: _save(np.zeros((9, 7)), d / "train/masks/1.png"), "train/masks/1.png has 7 x 9 pixels"),
    ("ids", lambda d: _save(np.full((32, 40), 9), d / "val/masks/2.png"), "val/masks/2.png holds the class id 9"),
    ("missing", lambda d: (d / "val/masks/0.png").unlink(), "val/images/0.png has no mask"),
    ("empty", lambda d: [p.unlink() for p in (d / "val/images").iterdir()], "no images in"),
    ("colour", lambda d: _save(np.zeros((32, 40, 3)), d / "train/masks/0.png"), "train/masks/0.png is no 8-bit"),
    ("broken", lambda d: (d / "train/masks/0.png").write_bytes(b"?"), "train/masks/0.png"),
    ("truncated", lambda d: _halve(d / "val/images/0.png"), "cannot read"),
])
def test_bad_masks(tmp_path, monkeypatch, capsys, name, spoil, words):
    striped(striped(tmp_path, 3, 0), 3, 1, split="val")
    spoil(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert words in user_error(evaluate.main, monkeypatch, capsys, "retrieve", "--checkpoint", "random", "--arch",
                               "tiny_convnet", "--data", tmp_path, "--workers", int(name == "truncated"))


# --- checkpoints of other projects ---------------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def theirs(state, timm=False):
    """A ConvNeXt's parameters as its authors name them (and VICRegL), or timm."""
    renamed = {}
    for key, value in state.items():
        if m := re.match(r"features\.([0246])\.(.*)", key):
            i = int(m[1]) // 2
            key = (f"stages.{i}.downsample." if i else "stem.") if timm else f"downsample_layers.{i}."
            key += m[2]
        elif m := re.match(r"features\.(\d)\.(\d+)\.(layer_scale|block\.\d)(.*)", key):
            part = {"layer_scale": "gamma", "block.0": "conv_dw" if timm else "dwconv", "block.2": "norm",
                    "block.3": "mlp.fc1" if timm else "pwconv1", "block.5": "mlp.fc2" if timm else "pwconv2"}[m[3]]
            key = f"stages.{int(m[1]) // 2}.{'blocks.' * timm}{m[2]}.{part}{m[4]}"
            value = value.flatten() if part == "gamma" else value
        else:
            key = key.replace("classifier.0.", "head.norm." if timm else "norm.")
        renamed[key] = value
    return renamed


def layouts(arch, state):
    """(name, what a file of another project holds)"""
    head = {"weight": torch.zeros(10, 4), "bias": torch.zeros(10)}
    yield "here", {"model": prefixed(state, "backbone.") | prefixed(head, "projector.0."), "args": {"arch": arch}, "step": 1}
    yield "VICReg, full", {"model": prefixed(state, "module.backbone.") | prefixed(head, "module.projector.0."), "epoch": 9}
    if arch == "resnet18":
        yield "plain with torchvision's and timm's head", state | prefixed(head, "fc.")
    if arch == "convnext_tiny":
        yield "torchvision", state | prefixed(head, "classifier.2.")
        yield "VICRegL", theirs(state)
        yield "its authors", {"model": theirs(state) | prefixed(head, "head.")}
        yield "timm", theirs(state, timm=True) | prefixed(head, "head.fc.")
    if arch == "tiny_vit":
        yield "timm", state | prefixed(head, "head.")
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        yield "DINO, CrIBo", {"student": prefixed(other, "module.backbone.") | prefixed(head, "module.head.mlp.0."),
                              "teacher": prefixed(state, "backbone.") | prefixed(head, "head.mlp.0."), "epoch": 3,
                              "args": argparse.Namespace(arch="vit_small", lr=0.1),
                              "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}}
        yield "CrIBo, teacher in DDP", {"student": other, "teacher": prefixed(state, "module.backbone.")}


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "tiny_vit"])
def test_layouts_of_checkpoints(tmp_path, monkeypatch, arch):
    monkeypatch.setitem(common.CONVNEXTS, "convnext_tiny", ((8, 16, 24, 32), (1, 1, 2, 1)))
    torch.manual_seed(1)
    backbone = common.build_backbone(arch).eval()
    for p in backbone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(x)
        for name, held in layouts(arch, backbone.state_dict()):
            torch.save(held, tmp_path / "w.pth")
            loaded = weights.load_backbone(tmp_path / "w.pth", arch)
            assert all(torch.equal(a, b) for a, b in zip(loaded(x), expected)), name


def test_torchvisions_vit(tmp_path):
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(64, 8, 4, 4, 128, 512).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    vit.heads, x = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    loaded = weights.load_backbone(tmp_path / "vit.pth", "tiny_vit")
    torch.testing.assert_close(loaded(x)[1], vit(x), rtol=1e-4, atol=1e-5)


def test_both_sides_of_a_mismatch_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = common.build_backbone("resnet18").state_dict()
    state["conv1.weight"], state["extra"] = torch.zeros(64, 3, 5, 5), torch.zeros(1)
    del state["bn1.bias"]
    torch.save(state, "other.pth")
    said = user_error(evaluate.main, monkeypatch, capsys, "knn", "--checkpoint", "other.pth", "--arch", "resnet18")
    for words in ("other.pth is not a resnet18", "1 missing in the file (bn1.bias)", "1 unexpected in the file (extra)",
                  "1 of another shape (conv1.weight (64, 3, 5, 5), not (64, 3, 7, 7))"):
        assert words in said


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, capsys, zipped):
    monkeypatch.chdir(tmp_path)
    for junk in (b"", b"hello world"):
        (tmp_path / "junk.pt").write_bytes(junk)
        assert "junk.pt is no file of weights" in user_error(
            evaluate.main, monkeypatch, capsys, "knn", "--checkpoint", "junk.pt", "--arch", "resnet18")
    if zipped:
        torch.save({"model": Malice()}, "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Malice()}, protocol=2))
    said = user_error(evaluate.main, monkeypatch, capsys, "knn", "--checkpoint", "evil.pt", "--arch", "resnet18")
    assert "evil.pt" in said and "not loaded" in said and not (tmp_path / "executed").exists()
