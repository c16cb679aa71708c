"""evaluate.py: each protocol against brute force, on one and on two processes."""
import json
import sys

import numpy as np
import pytest
import torch
from helpers import make_images, on_processes, script, user_error

import common
import evaluate


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

    def forward(self, x):
        return None, x.mean((2, 3))


def coloured(folder, count, seed):
    rng = np.random.default_rng(seed)
    for i, colour in enumerate(((220, 30, 30), (30, 220, 30), (30, 30, 220))):
        (folder / f"class{i}").mkdir(parents=True)
        for j in range(count):
            pixels = rng.normal(colour, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            evaluate.common.Image.fromarray(pixels).save(folder / f"class{i}" / f"{j}.png")
    return folder


def _knn(rank, world, folder):
    data = [common.open_data(folder, split) for split in ("train", "val")]
    return evaluate.knn(Means(), *data, 16, torch.device("cpu"), ks=(1, 5))


def test_knn_on_one_and_two_processes(tmp_path):
    coloured(tmp_path / "data" / "train", 9, 0)
    coloured(tmp_path / "data" / "val", 5, 1)
    (tmp_path / "data" / "val" / "class0" / "broken.png").write_bytes(b"not an image")
    one = _knn(0, 1, str(tmp_path / "data"))
    assert set(one) == {"1-NN", "1-NN weighted", "5-NN", "5-NN weighted"} and one["5-NN"] == 100
    assert on_processes(2, tmp_path / "group", _knn, str(tmp_path / "data")) == [one, one]


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
    (["--checkpoint", "backbone.pt", "--arch", "tiny_convnet", "--data", "flat"], "k-NN needs labels"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, args, word):
    monkeypatch.chdir(tmp_path)
    torch.save(common.build_backbone("tiny_convnet").state_dict(), "backbone.pt")
    make_images(tmp_path / "flat", 4, classes=0)
    assert word in user_error(evaluate.main, monkeypatch, capsys, "knn", "--workers", 0, "--size", 32, *args)


def test_random_checkpoint_on_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Shapes, "__len__", lambda self: 60)
    monkeypatch.setattr(sys, "argv", "evaluate.py knn --checkpoint random --arch tiny_convnet --size 32 --workers 0".split())
    evaluate.main()
    assert "k-NN on shapes" in capsys.readouterr().out and (tmp_path / "knn.json").exists()
