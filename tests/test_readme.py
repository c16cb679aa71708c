"""README.md: its snippets run and its commands name real files and flags."""
import importlib
import re
import shlex

import torch
from helpers import ROOT

import common
import vicreg

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_snippet(tmp_path, monkeypatch):
    model = vicreg.VICReg(common.build_backbone("tiny_convnet", 64), (8, 8))
    folder = tmp_path / "runs" / "vicreg-shapes"
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "args": {"arch": "tiny_convnet", "size": 64}}, folder / "last.pt")
    monkeypatch.chdir(tmp_path)
    names = {}
    (snippet,) = blocks("python")
    assert len(snippet.splitlines()) == 5
    exec(snippet, names)
    assert names["maps"].shape == (8, 64, 256) and names["pooled"].shape == (8, 256)


def test_commands_name_real_files_and_flags():
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    found = 0
    for command in commands:
        words = shlex.split(command.split("#")[0].replace("'", " "))
        for script in [w for w in words if w.endswith(".py")]:
            for flag in [w for w in words[words.index(script):] if w.startswith("--")]:
                flag = flag.split("=")[0].replace("--no-", "--")
                assert f'"{flag}"' in sources[script] + sources["common.py"], command
            found += 1
    assert found >= 6


def test_the_table_of_results_is_made_from_the_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "results")
    made = importlib.import_module("results").table()
    assert made.count("\n") > 5 and f"<!-- results -->\n{made}<!-- end -->" in README
