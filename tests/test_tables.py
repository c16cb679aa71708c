"""docs/tables.md and docs/data.md: scripts take each command, each table has a row, conversions."""
import importlib
import json
import re
import shlex
import sys
import types

import numpy as np
import pytest
from helpers import METHODS, ROOT, make_images, run
from PIL import Image

import common
import visualize
from evaluate import __main__ as evaluation
from evaluate import masks

TABLES = (ROOT / "docs" / "tables.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()
TRAINING = {**{f"{method}.py": method for method in METHODS}, "docs.lc_dino": "docs.lc_dino"}
SCRIPTS = (*TRAINING, "visualize.py", "evaluate")
PAPERS = {  # what each paper numbers, as far as its text is at hand
    "VICReg": ["Figure 1", "Table 1", "Table 2", "Table 3", "Table 4a", "Table 4b", "Table 5",
               "Table 6", "Figure 2", "Figure 4", "Figure 5"],
    "VICRegL": [*[f"Table {n}" for n in range(8, 12)], "Figure 4", "Figure 5"],
    "LC-loss": [*[f"Table {n}" for n in range(1, 15)], "Table 15a", "Table 15b", "Table 16",
                "Figure 1", "Figure 2", "Figure 3a", "Figure 3b", "Figure 4", "Figure 5"],
    "CrIBo": [*[f"Table {n}" for n in range(1, 8)], *[f"Figure {n}" for n in range(1, 6)]],
    "BagSSL": [f"Figure {n}" for n in range(6, 13)],
}


def commands():
    """All of the page, as lists of words. Flags alone are added to the paragraph's, or the row's,
    last whole command; before any command they are words of the text."""
    found = []
    for paragraph in re.split(r"\n\n|\n(?=[|-])", TABLES):
        whole = []
        for span in re.findall(r"`([^`]+)`", paragraph):
            words = shlex.split(span.replace("\n", " "))
            if words[0] in SCRIPTS and len(words) > 1:
                whole = words
                found.append(words)
            elif words[0].startswith("--") and whole:
                found.append(whole + words)
    return found


def parsed(words, monkeypatch, capsys):
    """What a script's own parser makes of a command; its one line where it refuses it."""
    script, *flags = words
    monkeypatch.setattr(sys, "argv", [script, *flags])
    if script in TRAINING:
        module = importlib.import_module(TRAINING[script])
        taken = []
        monkeypatch.setattr(module, "train", taken.append)
        code = run(module.__name__, *flags)
        assert code == 0, (words, capsys.readouterr().err)
        return taken[0]
    main = evaluation if script == "evaluate" else visualize
    try:
        return main.parse_args()
    except common.UserError as error:
        raise AssertionError(f"{shlex.join(words)}: {error}") from None


def test_every_table_and_figure_has_a_row():
    for paper, expected in PAPERS.items():
        section = TABLES.split(f"\n## {paper}\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| ((?:Table|Figure) \d+[ab]?) \|([^|]+)\|([^|]+)\|$", section, re.M)
        assert sorted(number for number, *_ in rows) == sorted(expected), paper
        for number, shows, command in rows:
            assert shows.strip() and command.strip(), (paper, number)


def test_the_commands_are_those_of_the_scripts(monkeypatch, capsys):
    folders = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", DATA, re.M))))
    named = {*folders, *common.DOWNLOADS}
    made, used = set(), set()
    all_commands = commands()
    assert len(all_commands) > 100
    for words in all_commands:
        if words[:2] == ["evaluate", "detect"] and "detect" not in evaluation.PROTOCOLS:
            continue
        args = parsed(words, monkeypatch, capsys)
        assert args.data is None or args.data in named, words
        runs = [str(path) for path in args.runs] if words[1] == "curves" else []
        if words[0] in TRAINING:
            made.add(f"runs/{args.name}")
        elif words[1] not in ("curves", "views"):
            runs.append(args.checkpoint)
        used.update(path for path in runs if path.startswith("runs/"))
    assert used <= made, used - made


def test_a_command_that_is_not_taken_fails(monkeypatch, capsys):
    for wrong in ("vicreg.py --data imagenet --projektor 8-8", "evaluate knn --layers 4",
                  "visualize.py neighbours", "lc_loss.py --data imagenet --local-loss l1",
                  "bagssl.py --data imagenett"):
        with pytest.raises((AssertionError, SystemExit)):
            parsed(wrong.split(), monkeypatch, capsys)


# --- conversions ----------------------------------------------------------------------------------

def write_masked(images, masks, names, suffix=".jpg", mask_suffix=".png"):
    """Small images, and masks that hold the ids 0, 1, 7 and 255."""
    ids = np.array([[0, 1], [7, 255]], np.uint8).repeat(8, 0).repeat(8, 1)
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(ids).convert("RGB").save(images / f"{name}{suffix}")
        if mask_suffix:
            Image.fromarray(ids).save(masks / f"{name}{mask_suffix}")


def write_list(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def run_block(word):
    """Runs the first block of docs/data.md, and those that contain `word`, in this folder."""
    first, *others = re.findall(r"```python\n(.*?)```", DATA, re.S)
    names = {}
    exec(first, names)
    chosen = [block for block in others if word in block]
    assert chosen, word
    for block in chosen:
        exec(block, names)


def open_both(name, monkeypatch):
    """The training and validation parts with masks, every pair read."""
    words = f"evaluate segment --checkpoint random --data {name}".split()
    monkeypatch.setattr(sys, "argv", words)
    both = masks.open_masks(evaluation.parse_args())
    for part in both:
        assert len(part) and all(part.pair(i) for i in range(len(part)))
    return both


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


def test_voc_with_the_masks_of_sbd(root, monkeypatch, capsys):
    voc = root / "VOCdevkit" / "VOC2012"
    write_masked(voc / "JPEGImages", voc / "SegmentationClass", ["a", "b", "v"])
    write_list(voc / "ImageSets/Segmentation/train.txt", "a", "b")
    write_list(voc / "ImageSets/Segmentation/val.txt", "v")
    sbd = root / "benchmark_RELEASE" / "dataset"
    write_masked(sbd / "img", sbd / "cls", ["a", "c", "d", "v"], mask_suffix="")
    write_list(sbd / "train.txt", "a", "c")
    write_list(sbd / "val.txt", "d", "v")
    mask = np.zeros((1, 1), [("Segmentation", object)])  # as scipy reads such a file, which is
    mask[0]["Segmentation"][0] = np.full((16, 16), 5, np.uint8)  # not among the requirements
    reader = types.SimpleNamespace(loadmat=lambda path: {"GTcls": mask})
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", reader)
    run_block("loadmat")
    assert capsys.readouterr().out == "4\n"
    train, val = open_both("voc_aug", monkeypatch)
    assert [np.array(train.pair(i)[1]).max() for i in range(4)] == [255, 255, 5, 5]
    assert len(val) == 1


def test_pascal_context_and_coco_stuff(root, monkeypatch):
    voc = root / "VOCdevkit" / "VOC2010"
    write_masked(voc / "JPEGImages", voc / "SegmentationClassContext", "abc")
    write_list(voc / "ImageSets/SegmentationContext/train.txt", "a", "c")
    write_list(voc / "ImageSets/SegmentationContext/val.txt", "b")
    run_block("pascal_context")
    assert [len(part) for part in open_both("pascal_context", monkeypatch)] == [2, 1]

    for part, names in (("train2017", "abc"), ("val2017", "d")):
        write_masked(root / "coco" / part, root / "stuffthingmaps" / part, names)
    run_block("cocostuff")
    assert [len(part) for part in open_both("cocostuff", monkeypatch)] == [3, 1]
    assert [len(common.open_data("coco", part)) for part in ("train", "val")] == [3, 1]


def test_parts_of_coco(root):
    for part, names in (("train2017", [f"{i:02}" for i in range(40)]), ("val2017", "d")):
        write_masked(root / "coco" / part, root / "unused", names)
    images = [dict(id=100 + i, file_name=f"{i:02}.jpg", width=16, height=16) for i in range(40)]
    items = [dict(id=i, image_id=100 + i // 2, bbox=[1, 1, 4, 5], area=20, iscrowd=0, category_id=1,
                  segmentation=[[1, 1, 5, 1, 5, 6]]) for i in range(80)]
    about = dict(images=images, annotations=items, categories=[dict(id=1, name="cat")])
    write_list(root / "coco/annotations/instances_train2017.json", json.dumps(about))
    about |= dict(images=[images[0] | dict(file_name="d.jpg")], annotations=items[:2])
    write_list(root / "coco/annotations/instances_val2017.json", json.dumps(about))
    run_block("coco{percent}")
    for percent, count in ((5, 2), (10, 4)):
        path = root / f"coco{percent}" / "annotations" / "instances_train2017.json"
        part = json.loads(path.read_text())
        chosen = {image["id"] for image in part["images"]}
        assert len(chosen) == count and len(part["annotations"]) == 2 * count
        assert {item["image_id"] for item in part["annotations"]} == chosen
        assert (root / f"coco{percent}" / "val2017" / "d.jpg").exists()
        if "detect" in evaluation.PROTOCOLS:
            args = types.SimpleNamespace(data=f"coco{percent}", size=16)
            parts = importlib.import_module("evaluate.objects").open_objects(args)
            assert [len(part) for part in parts] == [count, 1]


def test_cityscapes(root, monkeypatch):
    for part, city in (("train", "ulm"), ("train", "bonn"), ("val", "lyon")):
        names = [f"{city}_1", f"{city}_2"]
        write_masked(root / "leftImg8bit" / part / city, root / "gtFine" / part / city, names,
                     "_leftImg8bit.png", "_gtFine_labelIds.png")
    run_block("leftImg8bit")
    train, val = open_both("cityscapes", monkeypatch)
    assert (len(train), len(val)) == (4, 2)
    assert np.unique(np.array(train.pair(0)[1])).tolist() == [0, 255]  # a road; all else is void


def test_lists_become_class_folders(root):
    images = "data/vision/torralba/deeplearning/images256"
    make_images(root / images / "a", 4)
    for part, number in (("train", 0), ("val", 2)):
        write_list(root / f"trainvalsplit_places205/{part}_places205.csv",
                   f"a/class0/{number:04}.jpg 0", f"a/class1/{number + 1:04}.jpg 1")
    run_block("places205")

    make_images(root / "train_val2018", 4)
    for part, number in (("train", 0), ("val", 2)):
        files = [f"train_val2018/class{i}/{number + i:04}.jpg" for i in (0, 1)]
        listed = [dict(id=7 + i, file_name=file) for i, file in enumerate(files)]
        labels = [dict(image_id=7 + i, category_id=30 + i) for i in (0, 1)]
        about = json.dumps(dict(images=listed, annotations=labels))
        write_list(root / f"{part}2018.json", about)
    run_block("inat18")

    make_images(root / "imagenet" / "train", 6, classes=3)
    make_images(root / "imagenet" / "val", 6, classes=3)
    write_list(root / "imagenet100.txt", "class2", "class0")
    run_block("imagenet100")
    for name, classes in (("places205", ["000", "001"]), ("inat18", ["0030", "0031"]),
                          ("imagenet100", ["class0", "class2"])):
        for split in ("train", "val"):
            part = common.open_data(name, split)
            assert part.classes == classes and len(part) in (2, 4)
            assert all(part.load(i) for i in range(len(part)))


def test_the_data_of_few_shot_episodes(root):
    make_images(root / "ISIC2018_Task3_Training_Input", 2, classes=0)
    write_list(root / "ISIC2018_Task3_Training_GroundTruth.csv", "image,MEL,NV", "0000,0.0,1.0",
               "0001,1.0,0.0")
    make_images(root / "images", 3, classes=0)
    write_list(root / "Data_Entry_2017.csv", "Image Index,Finding Labels", "0000.jpg,Mass",
               "0001.jpg,Mass|Nodule", "0002.jpg,Nodule")
    make_images(root / "omniglot-py" / "images_background" / "Greek", 4)
    for jpg in (root / "omniglot-py").rglob("*.jpg"):
        jpg.rename(jpg.with_suffix(".png"))
    for word, classes in (("isic", ["MEL", "NV"]), ("chestx", ["Mass", "Nodule"]),
                          ("omniglot", ["Greek-class0", "Greek-class1"])):
        run_block(f"link(f\"{word}/")
        part = common.open_data(word)
        assert part.classes == classes and all(part.load(i) for i in range(len(part)))
