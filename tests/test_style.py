"""The rooms of the suite: who imports whom, where flags live, what must not be in any file."""

import ast
import re
from pathlib import Path

import pytest

from helpers.drawn import ROOT

FILES = {path.stem: path for path in ROOT.glob("*.py")}
# Verbs are run, nouns are imported.
VERBS = {"train", "score", "predict", "export", "check_dataset", "compare", "sigmas"} & set(FILES)
NOUNS = set(FILES) - VERBS


def imports(name):
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found & set(FILES)


def test_imports_have_no_circle():
    floors: dict[str, int] = {}
    while len(floors) < len(FILES):
        free = [name for name in FILES if name not in floors and imports(name) <= set(floors)]
        assert free, f"a circle among {sorted(set(FILES) - set(floors))}"
        floors |= {name: 1 + max((floors[other] for other in imports(name)), default=-1) for name in free}
    assert floors["utils"] == 0


# The floors of the files that users of torchvision's scripts know.
KNOWN = {
    "utils": 0, "transforms": 0, "group_by_aspect_ratio": 1, "presets": 1, "coco_utils": 2,
    "custom_dataset": 3, "coco_eval": 5, "engine": 7, "train": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_files_import_from_lower_floors_only(name):
    for other in imports(name) & set(KNOWN):
        assert KNOWN[other] < KNOWN[name]


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_imports_a_verb(name):
    assert not imports(name) & VERBS


# flags.py has the flags that train.py shares with the doctor; it parses nothing itself.
@pytest.mark.parametrize("name", sorted(NOUNS - {"flags"}))
def test_nouns_have_no_flags_and_do_not_exit(name):
    text = FILES[name].read_text()
    assert "ArgumentParser" not in text and "sys.exit" not in text and "__main__" not in text


def test_nothing_loads_or_evaluates_code():
    forbidden = re.compile(r"weights_only\s*=\s*False|pickle\.load|yaml\.load|(?<![\w.])eval\(|(?<![\w.])exec\(")
    for path in [*FILES.values(), *ROOT.glob("benchmarks/*.py")]:
        assert not forbidden.search(path.read_text()), path


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_and_functions_stay_readable(name):
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    assert len(FILES[name].read_text().splitlines()) <= 450
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            limit = 120 if node.name in ("main", "get_args_parser") else 90
            assert length <= limit, f"{name}.{node.name} has {length} lines"


def test_the_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in [*FILES.values(), *ROOT.glob("*.sh"), ROOT / "Makefile"]:
        assert f"{Path(path).name} " in readme or f"`{Path(path).name}`" in readme, path.name
