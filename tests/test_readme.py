"""README.md and docs/: snippets run; commands name real files and flags; named tests exist."""
import importlib
import re
import shlex

import torch
from helpers import METHODS, ROOT

import common
import vicreg

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_snippet(tmp_path, monkeypatch):
    model = vicreg.VICReg(common.build_backbone("tiny_convnet", 64), (8, 8))
    folder = tmp_path / "runs" / "vicreg-shapes"
    folder.mkdir(parents=True)
    args = {"arch": "tiny_convnet", "size": 64}
    torch.save({"model": model.state_dict(), "args": args}, folder / "last.pt")
    monkeypatch.chdir(tmp_path)
    names = {}
    (snippet,) = blocks("python")
    assert len(snippet.splitlines()) <= 6
    exec(snippet, names)
    assert names["maps"].shape == (8, 64, 256) and names["pooled"].shape == (8, 256)


def test_commands_name_real_files_and_flags():
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    sources["evaluate"] = "".join(path.read_text() for path in ROOT.glob("evaluate/*.py"))
    everywhere = sources["training.py"] + sources["common.py"]
    commands = [line for block in blocks("bash")
                for line in block.replace("\\\n", " ").splitlines()]
    found = 0
    for command in commands:
        words = shlex.split(command.split("#")[0].replace("'", " "))
        scripts = [word for word in words if word.endswith(".py") or word == "evaluate"]
        for script in scripts:
            if script == "evaluate":
                protocol = words[words.index(script) + 1]
                assert (ROOT / "evaluate" / f"{protocol}.py").exists(), command
            for flag in [word for word in words[words.index(script):] if word.startswith("--")]:
                flag = flag.split("=")[0]
                names = (f'"{flag}"', f'"{flag.replace("--no-", "--")}"')
                assert any(name in sources[script] + everywhere for name in names), command
            found += 1
    assert found >= 6


COLUMNS = {  # of docs/recipes.md
    "network": ("arch",), "pixels": ("size",), "images a step": ("batch_size",),
    "epochs, of warm-up": ("epochs", "warmup_epochs"), "base lr": ("base_lr",),
    "final lr": ("final_lr",), "weight decay": ("weight_decay", "final_weight_decay"),
    "projector or head": ("projector", "head"),
}


def tables_of_recipes():
    """A table of each method's RECIPES; what has no column of its own comes last."""
    text = ""
    for method in METHODS:
        recipes = importlib.import_module(method).RECIPES
        text += f"\n## {method}.py\n\n| recipe | {' | '.join(COLUMNS)} | further flags |\n"
        text += "| --- " * (len(COLUMNS) + 2) + "|\n"
        for name, recipe in recipes.items():
            left = dict(recipe)
            cells = [[str(left.pop(flag)) for flag in flags if flag in left]
                     for flags in COLUMNS.values()]
            rest = [f"{flag.replace('_', '-')} {value}" for flag, value in left.items()]
            row = [f"`{name}`", *map(", ".join, cells), ", ".join(rest)]
            text += "| " + " | ".join(row) + " |\n"
    return text


def test_the_tables_of_recipes_are_those_of_the_files():
    """`PYTHONPATH=. python tests/test_readme.py` writes them."""
    assert (ROOT / "docs" / "recipes.md").read_text().endswith(tables_of_recipes())


def test_every_test_that_is_named_exists():
    tests = {name for path in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        named = set(re.findall(r"`(test_\w+)`", path.read_text()))
        assert named <= tests, (path.name, named - tests)
    faults = (ROOT / "docs" / "faults.md").read_text().splitlines()
    rows = [row for row in faults if row.startswith("| ") and "---" not in row][1:]
    assert len(rows) > 15
    for row in rows:
        assert re.search(r"`test_\w+`", row.split("|")[-2]), row


def test_the_tables_of_results_are_made_from_the_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "results")
    results = importlib.import_module("results")
    text = (ROOT / "docs" / "results.md").read_text()
    for mark, made in results.tables().items():
        assert made.count("\n") >= 4  # a header, its rule, two rows
        assert f"<!-- {mark} -->\n{made}<!-- end -->" in text


if __name__ == "__main__":
    page = ROOT / "docs" / "recipes.md"
    introduction = page.read_text().partition("\n## vicreg.py")[0]
    page.write_text(introduction + tables_of_recipes())
