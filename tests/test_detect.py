"""Detection: COCO's average precision and masks against pycocotools' numbers, data, training."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import on_processes, user_error
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import masks_to_boxes

import common
import weights
from evaluate import __main__ as command
from evaluate import detect, detection, objects

CPU = torch.device("cpu")
ARGS = dict(protocol="detect", checkpoint="random", data="shapes", size=32, steps=1, batch_size=2,
            lr=None, freeze=False, bf16=False, workers=0, device=CPU)


def settings(**changes):
    return SimpleNamespace(**{**ARGS, **changes})


# --- average precision ----------------------------------------------------------------------------

def ellipses(boxes, height, width):
    """The pixels of the ellipses in boxes (n, 4), as (x0, y0, x1, y1)."""
    y, x = np.mgrid[:height, :width] + 0.5
    x0, y0, x1, y1 = boxes.T[:, :, None, None]
    across = (x - (x0 + x1) / 2) / (x1 - x0)
    down = (y - (y0 + y1) / 2) / (y1 - y0)
    return across**2 + down**2 < 0.25


def random_boxes(n, height, width, rng):
    sides = np.exp(rng.uniform(np.log(12), np.log(135), (n, 2)))
    corner = rng.uniform(0, 1, (n, 2)) * (np.array([width, height]) - sides)
    return np.round(np.concatenate([corner, corner + sides], 1))


def random_scenes(seed, count=40, classes=3):
    """[(found, truth), ...] with crowds, ignored objects, equal scores and equal boxes."""
    rng = np.random.RandomState(seed)  # its stream is the same in all versions of numpy
    scenes = []
    for index in range(count):
        height, width = rng.randint(140, 220, 2)
        n = rng.randint(0, 7)
        crowd = rng.uniform(size=n) < 0.15
        ignored = rng.uniform(size=n) < 0.15
        labels = rng.randint(1, classes + 1, n)
        true_boxes = random_boxes(n, height, width, rng)
        repeats = rng.randint(1, 5, n)
        near = np.repeat(true_boxes, repeats, 0)
        near = np.round(near + rng.normal(0, 4, near.shape))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 5)
        extra = 60 if index == 7 else rng.randint(0, 6)
        found_boxes = np.concatenate([near, random_boxes(extra, height, width, rng)])
        more = np.full(extra, 2) if index == 7 else rng.randint(1, classes + 1, extra)
        found_labels = np.concatenate([np.repeat(labels, repeats), more])
        scores = np.round(rng.uniform(size=len(found_boxes)), 2)
        truth = dict(boxes=true_boxes, labels=labels, crowd=crowd, ignored=ignored,
                     masks=ellipses(true_boxes, height, width))
        found = dict(boxes=found_boxes, labels=found_labels, scores=scores,
                     masks=ellipses(found_boxes, height, width))
        scenes.append((found, truth))
    return scenes


def average(kind, seed, rank=0, world=1):
    scenes = random_scenes(seed)
    n = len(scenes)
    judged = []
    for scene in scenes[n * rank // world : n * (rank + 1) // world]:
        found, truth = [{key: torch.from_numpy(x) for key, x in part.items()} for part in scene]
        truth["areas"] = truth["masks"].sum((1, 2))
        judged.append(detection.judge(kind, found, truth))
    return detection.table(judged, CPU)


# Of pycocotools 2.0.11 (COCOeval.stats[:6]) on the same scenes: masks as run lengths, an object's
# area that of its mask, an ignored object's area 1e11, which is out of all ranges, crowds iscrowd.
COCO = {
    ("boxes", 0): [21.2657902034, 45.9376777588, 18.3457974311, 12.8841444743, 30.2767862715,
                   26.9642857143],
    ("masks", 0): [22.0395883491, 45.3093040055, 18.7392348638, 13.3934965333, 29.8437106787,
                   70.0],
    ("boxes", 1): [18.9189140546, 39.5877708276, 15.9491463077, 9.4467921972, 27.9986987843, 90.0],
    ("masks", 1): [18.9541466483, 38.5325202992, 16.2007207133, 8.1938230428, 30.4338957279, 92.0],
}


@pytest.mark.parametrize("kind, seed", COCO)
def test_average_precision_is_pycocotools(kind, seed):
    found = average(kind, seed)
    assert list(found) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert list(found.values()) == pytest.approx(COCO[kind, seed], abs=1e-8)


def _averages(rank, world):
    return [average(kind, 1, rank, world) for kind in ("boxes", "masks")]


def test_two_processes_find_the_same_as_one():
    one = _averages(0, 1)
    assert on_processes(2, _averages) == 2 * [one]


def test_average_precision_by_hand():
    """Two objects; right, wrong, right: precision 1 to a recall of 0.5, then 2/3."""
    verdicts = torch.tensor([1.0, 0, 1])[:, None, None].expand(3, detection.A, detection.T)
    ap = detection.average_precision(verdicts, torch.full((4,), 2.0, dtype=torch.double))
    assert ap == pytest.approx(np.full((4, 10), (51 + 50 * 2 / 3) / 101))
    nothing = detection.average_precision(verdicts, torch.zeros(4, dtype=torch.double))
    assert nothing.isnan().all()


def test_without_objects_there_is_no_number():
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
                areas=torch.zeros(0), crowd=torch.zeros(0, dtype=torch.bool),
                ignored=torch.zeros(0, dtype=torch.bool))
    one = dict(boxes=torch.tensor([[0.0, 0, 9, 9]]), labels=torch.tensor([1]),
               scores=torch.tensor([0.5]))
    for judged in ([], [detection.judge("boxes", one, none)]):
        assert set(detection.table(judged, CPU).values()) == {None}


# --- masks ----------------------------------------------------------------------------------------

def test_run_lengths_are_pycocotools():
    noise = np.random.RandomState(3).uniform(size=(9, 14)) < 0.4
    text = "224OO0032N1OM0O050J0161JN0100101OO0O000020N001410NN0O2OO0O1"
    assert (objects.decode({"size": [9, 14], "counts": text}, 14, 9) == noise).all()
    y, x = np.mgrid[:40, :50]
    disc = (x - 20) ** 2 + (y - 22) ** 2 < 300
    text = "[47n06K4L4M2N2N2N2O0O2O0O2O000O2O000000000001N10001N101N101N2N2N2N3L4L5J`>"
    assert (objects.decode({"counts": text}, 50, 40) == disc).all()
    plain = objects.decode({"counts": [2, 3, 1]}, 3, 2)  # along the columns
    assert plain.tolist() == [[False, True, True], [False, True, False]]


def test_polygons_are_nearly_pycocotools():
    polygons = [[10.3, 5.2, 60.8, 12.5, 44.1, 70.0, 20.0, 50.5], [70, 10, 90, 10, 90, 30, 70, 30]]
    text = ("Ui01_24L5L4K4L5K5K5K4M4K3M1O1O001O100O1O001O1O1O10O01O1O1O1O00100O1O1O0000L4M4K4M3M3L"
            "4M3L5L3L4M3L4M3L4M4L`f0c0PYO0000000000000000000000000000000000000fh0")
    theirs = objects.decode({"counts": text}, 100, 80)
    ours = objects.decode(polygons, 100, 80)
    assert theirs.sum() == 2361
    assert (ours[:, 65:] == theirs[:, 65:]).all() and ours[:, 65:].sum() == 400  # the square
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.98
    ring = objects.decode([[0, 0, 9, 0, 9, 9, 0, 9, 0, 0, 3, 3, 3, 6, 6, 6, 6, 3, 3, 3]], 9, 9)
    assert ring.sum() == 72 and not ring[3:6, 3:6].any()


# --- data -----------------------------------------------------------------------------------------

def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        Image.new("RGB", content, "gray").save(path)


def voc_xml(*rows):
    said = [f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{x0}</xmin>"
            f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, hard, x0, y0, x1, y1 in rows]
    return f"<annotation>{''.join(said)}</annotation>"


def make_voc(root):
    for year, part in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
        folder = root / "VOCdevkit" / f"VOC{year}"
        name = f"{year}_{part}"
        save(folder / "ImageSets" / "Main" / f"{part}.txt", f"{name}\n")
        save(folder / "JPEGImages" / f"{name}.jpg", (40, 30))
        save(folder / "Annotations" / f"{name}.xml",
             voc_xml(("dog", 0, 1, 1, 40, 30), ("cat", 1, 11, 6, 20, 25)))


def make_coco(root):
    polygon = [[10, 5, 20, 5, 20, 25, 10, 25]]
    annotations = [
        dict(image_id=7, category_id=90, bbox=[10, 5, 10, 20], area=200, iscrowd=0,
             segmentation=polygon),
        dict(image_id=7, category_id=3, bbox=[0, 0, 40, 30], area=500, iscrowd=1,
             segmentation={"counts": [600, 600], "size": [30, 40]}),
    ]
    content = dict(images=[dict(id=7, file_name="a.jpg"), dict(id=9, file_name="b.jpg")],
                   annotations=annotations,
                   categories=[dict(id=3, name="cat"), dict(id=90, name="dog")])
    for split in ("train2017", "val2017"):
        save(root / "annotations" / f"instances_{split}.json", json.dumps(content))
        for name in ("a.jpg", "b.jpg"):
            save(root / split / name, (40, 30))


def make_yolo(root, layout="{kind}/{split}"):
    for split in ("train", "val"):
        labels = root / layout.format(kind="labels", split=split)
        images = root / layout.format(kind="images", split=split)
        save(images / "a.jpg", (40, 30))
        save(images / "b.jpg", (40, 30))  # without objects, without labels
        save(labels / "a.txt", "3 0.375 0.5 0.25 0.6666667\n0 0.5 0.5 1 1\n")


def opened(folder, **changes):
    return objects.open_objects(settings(data=str(folder), **changes))


def test_voc(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    make_voc(tmp_path)
    train, val = opened("voc")
    assert (len(train), len(val)) == (2, 1) and not train.has_masks
    assert train.classes == ["cat", "dog"]
    image, target = val[0]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[0, 0, 40, 30], [10, 5, 20, 25]]
    assert target["labels"].tolist() == [2, 1]
    assert target["areas"].tolist() == [1200, 200]
    assert target["ignored"].tolist() == [False, True] and not target["crowd"].any()


def test_coco(tmp_path):
    make_coco(tmp_path)
    train, val = opened(tmp_path)
    assert len(train) == len(val) == 2 and val.classes == ["cat", "dog"] and val.has_masks
    image, target = val[0]
    assert target["boxes"].tolist() == [[10, 5, 20, 25], [0, 0, 40, 30]]
    assert target["labels"].tolist() == [2, 1] and target["crowd"].tolist() == [False, True]
    assert target["areas"].tolist() == [200, 500] and not target["ignored"].any()
    assert target["masks"].sum((1, 2)).tolist() == [200, 600]
    assert target["masks"][0, 5:25, 10:20].all() and target["masks"][1, :, 20:].all()
    assert val[1][1]["masks"].shape == (0, 30, 40)

    pixels, target = detect.Mirrored(train)[0, 0]
    assert target["labels"].tolist() == [2]  # without the crowd


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}"])
def test_yolo(tmp_path, layout):
    make_yolo(tmp_path, layout)
    train, val = opened(tmp_path)
    assert len(train) == len(val) == 2 and val.classes == [0, 3] and not val.has_masks
    _, target = val[0]
    expected = torch.tensor([[10.0, 5, 20, 25], [0, 0, 40, 30]])
    assert torch.allclose(target["boxes"], expected, atol=1e-4)
    assert target["labels"].tolist() == [2, 1]
    assert val[1][1]["boxes"].shape == (0, 4)


def test_scenes_have_objects():
    """Their masks together are the scene's; what is drawn later lies above, and counts apart."""
    scenes = objects.ShapesObjects("val", 96)
    several = 0
    for index in range(20):
        image, target = scenes[index]
        plain = objects.shapes.Shapes("val", 96)
        pixels, classes = plain.scene(index)
        assert (image.permute(1, 2, 0).numpy() == pixels).all()
        masks = target["masks"].numpy()
        assert (masks.sum(0) == (classes > 0)).all()  # no two have a pixel in common
        assert ((masks * target["labels"].numpy()[:, None, None]).sum(0) == classes).all()
        for (x0, y0, x1, y1), mask in zip(target["boxes"].int().tolist(), masks):
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0].any() and mask[y1 - 1].any()
            assert mask[:, x0].any() and mask[:, x1 - 1].any()
        several += len(target["labels"]) > len(set(target["labels"].tolist()))
    assert several > 10  # objects of the same class


def test_mirrored_images_have_mirrored_objects():
    scenes = objects.ShapesObjects("train", 48)
    loaded = detect.Mirrored(scenes)
    mirrored = 0
    for index in range(12):
        plain, truth = scenes[index]
        image, target = loaded[0, index]
        if torch.equal(image, plain):
            continue
        mirrored += 1
        assert torch.equal(image.flip(2), plain)
        assert torch.equal(target["masks"].flip(2), truth["masks"])
        boxes = masks_to_boxes(target["masks"])
        boxes[:, 2:] += 1
        assert torch.equal(boxes, target["boxes"])
    assert 2 < mirrored < 10


@pytest.mark.parametrize("spoil, words", [
    (lambda root: None, "images with objects"),
    (lambda root: save(root / "labels" / "train" / "a.txt", "1 0.5 0.5\n"), "not enough values"),
    (lambda root: save(root / "annotations" / "instances_train.json", "{"), "Expecting"),
    (lambda root: save(root / "annotations" / "x.json", "{}"), "--help"),
])
def test_bad_labels(tmp_path, spoil, words):
    for split in ("train", "val"):
        save(tmp_path / "images" / split / "a.jpg", (8, 8))
    spoil(tmp_path)
    with pytest.raises(common.UserError, match=words):
        opened(tmp_path)


def test_a_part_without_images(tmp_path):
    make_yolo(tmp_path)
    for path in (tmp_path / "images" / "val").iterdir():
        path.unlink()
    with pytest.raises(common.UserError, match="images with objects"):
        opened(tmp_path)


def test_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA", str(tmp_path))
    flags = ["--checkpoint", "random", "--arch", "tiny_convnet", "--workers", 0]
    said = user_error(command.main, monkeypatch, capsys, "detect", *flags, "--data", "voc")
    assert "cannot read the objects of voc" in said and "--help" in said
    make_coco(tmp_path / "coco")
    (tmp_path / "coco" / "train2017" / "a.jpg").write_bytes(b"no image")
    flags += ["--data", "coco", "--size", 32, "--steps", 1, "--batch-size", 2]
    said = user_error(command.main, monkeypatch, capsys, "detect", *flags)
    assert "cannot read" in said and "a.jpg" in said


# --- model and training ---------------------------------------------------------------------------

def test_the_papers_detector_is_torchvisions():
    """Heads, anchors and sizes as of maskrcnn_resnet50_fpn, but for BatchNorm in the pyramid."""
    data = SimpleNamespace(form="coco", has_masks=True, classes=90 * ["class"])
    ours = detect.build(common.build_backbone("resnet50"), data, settings(size=800))
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    for part in ("rpn", "roi_heads"):
        a, b = [getattr(model, part).state_dict() for model in (ours, theirs)]
        assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
    sizes = [tuple(level) for level in ours.rpn.anchor_generator.sizes]
    assert tuple(sizes) == theirs.rpn.anchor_generator.sizes
    assert ours.transform.max_size == theirs.transform.max_size == 1333
    assert list(ours.transform.min_size) == [640, 672, 704, 736, 768, 800]
    levels = ours.backbone.eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in levels.values()] == [
        (256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3), (256, 1, 2)]


@pytest.mark.parametrize("arch", ["tiny_convnet", "resnet18", "tiny_vit", "convnext_tiny"])
@pytest.mark.parametrize("freeze", [False, True])
def test_training(arch, freeze):
    backbone = common.build_backbone(arch, 64)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    args = settings(size=64, freeze=freeze, bf16=freeze)
    scenes = objects.ShapesObjects("train", 96)
    model = detect.fine_tune(backbone, scenes, args)
    same = [torch.equal(x, before[name]) for name, x in backbone.state_dict().items()]
    changed = len(same) - sum(same)
    assert changed == 0 if freeze else changed > len(same) / 2
    assert args.lr == (1e-4 if arch in ("tiny_vit", "convnext_tiny") else 0.02)
    assert not model.training


class Oracle(torch.nn.Module):
    """Finds all objects of a data set, in the order of its images; masks as probabilities."""

    def __init__(self, data, shift=0):
        super().__init__()
        self.truths = (data[index][1] for index in range(len(data)))
        self.shift = shift

    def forward(self, images):
        truth = next(self.truths)
        found = dict(boxes=truth["boxes"] + self.shift, labels=truth["labels"],
                     scores=torch.ones(len(truth["labels"])))
        if "masks" in truth:
            found["masks"] = 0.9 * truth["masks"][:, None].roll(self.shift, 3).float()
        return [found]


def test_who_finds_all_has_100(tmp_path):
    scenes = objects.ShapesObjects("val", 48)
    scenes.length = 20
    for shift, low, high in ((0, 100, 100), (1, 5, 95)):
        rows = detect.measure(Oracle(scenes, shift), scenes, settings())
        assert list(rows) == ["boxes", "masks"]
        for row in rows.values():
            assert low <= row["AP"] <= high + 1e-9
            assert row["APl"] is None
    make_yolo(tmp_path)
    (row,) = detect.measure(Oracle(opened(tmp_path)[1]), opened(tmp_path)[1], settings()).values()
    assert row["AP"] == pytest.approx(100)


def test_schedule():
    """VICReg, B.4: warmup from a third, divided by 10 twice; VOC's in steps of 24,000."""
    voc = detect.PRESETS["voc"]
    steps = [0, 500, 1000, 17_999, 18_000, 21_999, 22_000, 23_999]
    factors = [detect.schedule(step / voc["steps"], voc["warmup"], voc["drops"]) for step in steps]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01])
    coco = detect.PRESETS["coco"]
    steps = [0, 25, 50, 59_999, 60_000, 79_999, 80_000]
    factors = [detect.schedule(s / coco["steps"], coco["warmup"], coco["drops"]) for s in steps]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01])


def test_command(tmp_path, monkeypatch, capsys):
    torch.save(common.build_backbone("tiny_convnet").state_dict(), tmp_path / "backbone.pt")
    make_coco(tmp_path / "coco")
    monkeypatch.setitem(detect.PRESETS, "coco", detect.PRESETS["shapes"] | dict(lr=0.04))  # quick
    line = (f"detect --checkpoint {tmp_path}/backbone.pt --arch tiny_convnet --data "
            f"{tmp_path}/coco --size 64 --steps 1 --batch-size 2 --workers 0 --no-bf16 "
            "--baseline --freeze")
    monkeypatch.setattr("sys.argv", ["evaluate", *line.split()])
    command.main()
    result = json.loads((tmp_path / "detect.jsonl").read_text())
    assert len(result["rows"]) == 4 and result["settings"]["lr"] == 0.04
    assert all(list(row) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
               for row in result["rows"].values())
    assert "random initialisation: masks" in capsys.readouterr().out
    kept = torch.load(tmp_path / "detector.pt", weights_only=True)
    assert kept["args"] == dict(arch="tiny_convnet", data=f"{tmp_path}/coco", size=64, bf16=False)
    data = objects.open_objects(SimpleNamespace(**kept["args"]))[1]
    backbone = weights.load_backbone(tmp_path / "detector.pt")
    model = detect.build(backbone, data, SimpleNamespace(**kept["args"]))
    model.load_state_dict(kept["detector"])


def test_a_detector_that_cannot_be_kept_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detect, "fine_tune", lambda backbone, data, args: backbone)
    monkeypatch.setattr(detect, "measure", lambda *args: {"boxes": {"AP": 1.0}})
    args = settings(checkpoint=str(tmp_path / "nowhere" / "backbone.pt"), arch="tiny_convnet")
    assert detect.run(torch.nn.Linear(1, 1), (None, None), args) == {"boxes": {"AP": 1.0}}
    assert "cannot write" in capsys.readouterr().err


def _trained(rank, world):
    backbone = common.build_backbone("tiny_convnet")
    torch.manual_seed(0)
    scenes = objects.ShapesObjects("train", 48)
    model = detect.fine_tune(backbone, scenes, settings(batch_size=4, steps=2))
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def test_processes_end_with_the_same_detector():
    first, second = on_processes(2, _trained)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
