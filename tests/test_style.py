"""The rooms of the suite: who imports whom, where flags live, what must not be in any file."""

import ast
import re

import pytest

from helpers.drawn import ROOT

# The floor plan, from the ground up. A file imports from lower floors, or from its own folder without a circle.
FLOORS = (
    ("process", "files"),
    ("utils", "optimization", "pixels"),
    ("annotations", "models", "transforms", "group_by_aspect_ratio"),
    ("runtime", "presets", "coco_utils"),
    ("evaluation", "custom_dataset"),
    ("loading", "drawing", "compare"),
    ("coco_eval", "inference"),
    ("engine", "sigmas", "score", "export"),
    ("training", "flags", "flag_checks"),
    ("report",),
    ("train", "predict", "inspection"),
    ("check_dataset",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Verbs are run, nouns are imported.
VERBS = {"train", "score", "predict", "export", "check_dataset", "compare", "sigmas"}

FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# Every file by its module name.
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted([*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))])
}
NOUNS = sorted(set(FILES) - VERBS)


def imports(name):
    """Return the modules of the suite that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: an import says where a thing lives"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(FILES)


def climbs(name, others):
    """Return which of the modules that ``name`` imports do not lie on a lower floor or in its folder."""
    room = name.split(".")[0]
    return {o for o in others if o.split(".")[0] != room and FLOOR_OF[o.split(".")[0]] >= FLOOR_OF[room]}


def test_every_file_has_its_floor():
    assert {name.split(".")[0] for name in FILES} == set(FLOOR_OF)
    assert len(list(ROOT.glob("*.py"))) < 20


@pytest.mark.parametrize("name", FILES)
def test_imports_do_not_climb(name):
    assert not climbs(name, imports(name))


def test_an_import_that_climbs_is_found():
    assert climbs("pixels.masks", {"utils", "annotations.arrays", "pixels.images"}) == {"utils", "annotations.arrays"}
    assert climbs("engine", {"coco_eval", "training.epochs"}) == {"training.epochs"}


def test_imports_have_no_circle():
    left = {name: imports(name) for name in FILES}
    while left:
        free = [name for name in left if not left[name] & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_a_verb(name):
    assert not imports(name) & VERBS


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_owns_and_hands_nothing_on(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree)
    first = re.search(r"Open first: ``(\w+\.py)``", ast.get_docstring(tree))
    assert first and (ROOT / folder / first[1]).is_file()


# flags.py and flag_checks.py have what train.py shares with the doctor; they parse nothing themselves.
@pytest.mark.parametrize("name", [name for name in NOUNS if name not in ("flags", "flag_checks")])
def test_nouns_have_no_flags_and_do_not_exit(name):
    text = FILES[name].read_text()
    assert "ArgumentParser" not in text and "sys.exit" not in text and "__main__" not in text


def test_nothing_loads_or_evaluates_code():
    forbidden = re.compile(r"weights_only\s*=\s*False|pickle\.load|yaml\.load|(?<![\w.])eval\(|(?<![\w.])exec\(")
    for path in [*FILES.values(), *ROOT.glob("benchmarks/*.py")]:
        assert not forbidden.search(path.read_text()), path


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_readable(name):
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    assert len(FILES[name].read_text().splitlines()) <= 450
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            limit = 120 if node.name in ("main", "get_args_parser") else 90
            assert length <= limit, f"{name}.{node.name} has {length} lines"


@pytest.mark.parametrize("name", FILES)
def test_docstrings_say_what_a_value_is(name):
    """An entry "root: Of the image files." tells no more than the name."""
    empty = [
        line.strip() for line in FILES[name].read_text().splitlines() if re.match(r'\s+(\w+: |""")(Of|Whose) ', line)
    ]
    assert not empty


def test_tests_stand_where_the_code_stands():
    stray = [
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("*.py")
        if path.parent != ROOT / "tests" and path.parent.name not in {*FOLDERS, "helpers", "faults", "cluster"}
    ]
    assert not stray
