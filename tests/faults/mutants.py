"""Tests that are tested: change the code in one place at a time, and see whether a test notices.

    python -m tests.faults.mutants                                   # 25 changes to each file, about an hour of one core
    python -m tests.faults.mutants pixels/masks.py --per-file 100    # one file, more changes
    python -m tests.faults.mutants pixels/masks.py:88:1              # one change, by the name that a run prints

Which places are changed is drawn from ``--seed``. Each changed file is read by the tests that `TESTS` names for it, in a
copy of the tracked files and in a process of its own: the quick ones, and where they pass those marked slow. A test that fails, or takes five times as
long, kills the mutant. What survives is either a missing test or code that gives the same result both ways. Linux: it forks.
"""

import argparse
import ast
import contextlib
import copy
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The files that decide numbers, and the quick tests that must know when one of them is wrong.
TESTS = {
    "evaluation/coco_matching.py": ("evaluation/test_similarity.py", "test_coco_eval.py"),
    "evaluation/coco_metrics.py": ("test_coco_eval.py", "evaluation/test_bootstrap.py"),
    "evaluation/similarity.py": ("evaluation/test_similarity.py", "test_coco_eval.py"),
    "evaluation/bootstrap.py": ("evaluation/test_bootstrap.py", "test_compare.py"),
    "evaluation/sigma_estimation.py": ("test_sigmas.py",),
    "group_by_aspect_ratio.py": ("test_group_by_aspect_ratio.py",),
    "optimization/schedule.py": ("optimization/test_optimizer.py",),
    "pixels/geometry.py": ("pixels/test_geometry.py", "pixels/test_lazy_image.py"),
    "pixels/masks.py": ("pixels/test_masks.py",),
    "annotations/skeleton.py": ("annotations/test_skeleton.py",),
    "annotations/labels.py": ("annotations/test_labels.py",),
    "runtime/checkpoint.py": ("runtime/test_checkpoint.py",),
    "runtime/progress.py": ("runtime/test_progress.py",),
    "training/state.py": ("training/test_restore.py", "training/test_state.py", "training/test_resume.py"),
}
PRELOADED = ("torch", "torchvision", "pycocotools.cocoeval", "scipy", "PIL.Image", "pytest", "hypothesis", "matplotlib")

MARKS = ("not slow", "slow")

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARISONS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div}
OPERATORS |= {
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
}
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "floor": "ceil", "ceil": "floor"}
NAMES |= {"any": "all", "all": "any", "left": "right", "right": "left", "argmin": "argmax", "argmax": "argmin"}


@dataclass(frozen=True)
class Mutant:
    """One change: the file's whole new text, and where and what it is."""

    file: str
    line: int
    number: int
    what: str
    text: str

    @property
    def name(self) -> str:
        """What the command line takes."""
        return f"{self.file}:{self.line}:{self.number}"


def changes_of(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (what it says, the node to stand in its place) of every change to one node."""
    if isinstance(node, ast.Compare):
        for n, operator in enumerate(node.ops):
            if type(operator) in COMPARISONS:
                changed = copy.deepcopy(node)
                changed.ops[n] = COMPARISONS[type(operator)]()
                yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        changed = copy.deepcopy(node)
        changed.op = OPERATORS[type(node.op)]()
        yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed
    elif isinstance(node, ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield f"{ast.unparse(node)} -> {ast.unparse(node.operand)}", node.operand
    elif isinstance(node, ast.IfExp):
        changed = copy.deepcopy(node)
        changed.body, changed.orelse = changed.orelse, changed.body
        yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value} -> {node.value + 1}", ast.Constant(node.value + 1)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield f"{node.id} -> {NAMES[node.id]}", ast.Name(NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        changed = copy.deepcopy(node)
        changed.attr = NAMES[node.attr]
        yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed


def replaced(text: str, node: ast.AST, new: ast.AST) -> str:
    """Return a source text with one node's part of it exchanged; everything else stays as it is written."""
    lines = text.encode().splitlines(keepends=True)  # ast counts columns in bytes
    starts = [0, *itertools.accumulate(map(len, lines))]
    assert isinstance(node, ast.expr | ast.stmt) and node.end_lineno is not None and node.end_col_offset is not None
    first, last = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    part = ast.unparse(new) if isinstance(new, ast.stmt) else f"({ast.unparse(new)})"
    return b"".join([text.encode()[:first], part.encode(), text.encode()[last:]]).decode()


def mutants_of(file: str, text: str) -> list[Mutant]:
    """Return every change to a file's functions, in the order of its lines; hints of types and raised texts stay."""
    tree = ast.parse(text)
    found: list[Mutant] = []
    counts: dict[int, int] = {}

    def search(node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise | ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST):
                    continue
                for what, new in changes_of(child):
                    line = getattr(child, "lineno", 0)
                    counts[line] = counts.get(line, 0) + 1
                    found.append(Mutant(file, line, counts[line], what, replaced(text, child, new)))
                search(child)

    for top in tree.body:
        if isinstance(top, ast.FunctionDef | ast.ClassDef):
            search(top)
    return sorted(found, key=lambda mutant: (mutant.line, mutant.number))


def copy_tracked(target: Path) -> None:
    """Copy the files that git knows, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _in_child(tree: Path, file: str, marks: str, log: Path) -> int:
    """Run tests in this process, which has just been forked; returns 0 where all pass."""
    os.setsid()
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), str(tree / "tests"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    import pytest

    options = ["-x", "-n", "0", "-m", marks, "-p", "no:cacheprovider", "--basetemp", str(log.with_suffix(""))]
    options += ["-o", "addopts=--import-mode=importlib", *(f"tests/{test}" for test in TESTS[file])]
    return 0 if pytest.main(options) in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else 1


def run_tests(tree: Path, file: str, marks: str, limit: float | None, log: Path) -> tuple[bool, float]:
    """Run a file's tests with these marks, in a child; returns whether all pass in time, and the seconds it took."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os._exit(_in_child(tree, file, marks, log))
        except BaseException:  # what ends the child must not run the parent's clean-up in it
            traceback.print_exc()
            os._exit(1)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - started
        if done:
            return os.waitstatus_to_exitcode(status) == 0, seconds
        if limit is not None and seconds > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, seconds
        time.sleep(0.02)


def survives(mutant: Mutant, tree: Path, text: str, seconds: dict[str, float], log: Path) -> bool:
    """Return whether all tests pass with a change; the slow ones run where the quick ones do not see it.

    Args:
        mutant: The change.
        tree: A copy of the tracked files.
        text: The file's text without the change.
        seconds: What the tests take without a change, by their mark; measured when they are needed first.
        log: For what the tests print.
    """
    for marks in MARKS:
        if marks not in seconds:
            (tree / mutant.file).write_text(text)
            passed, seconds[marks] = run_tests(tree, mutant.file, marks, None, log)
            if not passed:
                raise RuntimeError(f"{mutant.file}: its tests fail without a change:\n{log.read_text()[-3000:]}")
        (tree / mutant.file).write_text(mutant.text)
        if not run_tests(tree, mutant.file, marks, 5 * seconds[marks] + 10, log)[0]:
            return False
    return True


def choose(names: list[str], per_file: int, seed: int) -> dict[str, list[Mutant]]:
    """Return the mutants of every file to try: those that are named, or ``per_file`` of each file that is named."""
    chosen: dict[str, list[Mutant]] = {}
    for name in names or TESTS:
        file, _, place = name.partition(":")
        if file not in TESTS:
            raise SystemExit(f"{name}: expected one of {', '.join(TESTS)}, or FILE:LINE:NUMBER of one of them")
        found = mutants_of(file, (ROOT / file).read_text())
        if place:
            picked = [mutant for mutant in found if mutant.name == name]
            if not picked:
                raise SystemExit(f"{name}: no such change; the file has another at {found[0].name}, for example")
        else:
            picked = random.Random(f"{seed} {file}").sample(found, min(per_file, len(found)))
        chosen.setdefault(file, []).extend(sorted(picked, key=lambda mutant: (mutant.line, mutant.number)))
    return chosen


def main(args: argparse.Namespace) -> int:
    """Run the mutants and print the score of every file, and who survived."""
    chosen = choose(args.names, args.per_file, args.seed)
    for name in PRELOADED:  # once, for all children
        with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
            __import__(name)
    sys.dont_write_bytecode = True  # a changed file of the same second and size would be taken for the old one
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder, "tree"), Path(folder, "tests.log")
        copy_tracked(tree)
        for file, mutants in chosen.items():
            text = (tree / file).read_text()
            seconds: dict[str, float] = {}
            alive = []
            for mutant in mutants:
                if survives(mutant, tree, text, seconds, log):
                    alive.append(mutant)
                    print(f"survived: {mutant.name}: {mutant.what}", flush=True)
            (tree / file).write_text(text)
            survivors += alive
            taken = ", ".join(f"those {marks} take {s:.1f} s" for marks, s in seconds.items())
            print(f"{file}: {len(mutants) - len(alive)} of {len(mutants)} killed; of its tests {taken}", flush=True)
    tried = sum(map(len, chosen.values()))
    print(f"all: {tried - len(survivors)} of {tried} killed")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FILE or FILE:LINE:NUMBER", help=", ".join(TESTS))
    parser.add_argument("--per-file", type=int, default=25, help="changes to a file")
    parser.add_argument("--seed", type=int, default=0, help="draw the changes from this number")
    sys.exit(main(parser.parse_args()))
