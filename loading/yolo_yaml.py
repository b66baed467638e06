"""``data.yaml`` as YOLO users have it: where the pictures of each split are, what classes and keypoints are called."""

import logging
import os
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from annotations.findings import BadDataError, Finding, Findings
from annotations.forms import NAMES, short, whole_number
from annotations.skeleton import COCO_PERSON_KEYPOINTS, Skeleton, flip_order, ignored_pairs, infer_flip_pairs
from files import read_text
from loading.split import implied_pairs

logger = logging.getLogger(__name__)

# Ten thousand class names take a fraction of this.
MAX_YAML_BYTES = 1 << 20

_INDEX = whole_number(0, 1 << 20, "a whole number")
_NUM_POINTS = whole_number(1, 1000, "a number of keypoints")
_POINT_SIZE = whole_number(2, 3, "2 (x, y) or 3 (x, y, v)")


@dataclass(frozen=True)
class YoloInfo:
    """What ``data.yaml`` says.

    Attributes:
        path: The file.
        root: The folder that its paths are relative to.
        pictures: Folders of pictures, or text files that list them, of the roles ``train`` and ``val``; as written.
        classes: Names of the classes 0, 1, ...
        num_keypoints: Per object; 0 without ``kpt_shape``.
        point_size: Numbers per keypoint: 2 (x, y) or 3 (x, y, v).
        skeleton: Names and mirror map of the keypoints.
    """

    path: Path
    root: Path
    pictures: dict[str, tuple[str, ...]]
    classes: tuple[str, ...]
    num_keypoints: int = 0
    point_size: int = 3
    skeleton: Skeleton = field(default_factory=Skeleton)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, of which ten lines make a billion entries, and without keys twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"aliases such as *{event.anchor} are not read; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        record = super().construct_mapping(node, deep=deep)
        if len(record) != len(node.value):
            problem = "a key occurs twice in one mapping"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return record


def find_yaml(path: Path) -> Path:
    """Return the ``data.yaml`` that ``--data-path`` names: the file itself, or the only one in a folder.

    Raises:
        FileNotFoundError: There is none, or several.
    """
    if path.is_file():
        return path
    found = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml")) if path.is_dir() else []
    named = [p for p in found if p.stem == "data"] or found
    if len(named) == 1:
        return named[0]
    what = f"{len(found)} yaml files in this folder" if path.is_dir() else "no such file"
    raise FileNotFoundError(f"{path}: {what}; set --data-path to the dataset's data.yaml")


def read_yaml(path: Path) -> dict[Any, Any]:
    """Parse a yaml file that holds one mapping.

    Raises:
        BadDataError: One line that names file and position.
    """

    def fail(problem: str, remedy: str = "correct the file") -> BadDataError:
        return BadDataError([Finding("yaml", str(path), problem, remedy)])

    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise fail(f"{size} bytes are more than the limit of {MAX_YAML_BYTES}", "is this the dataset's data.yaml?")
    try:
        content = _StrictLoader(read_text(path)).get_single_data()
    except UnicodeDecodeError as error:
        raise fail(f"not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    except OSError:
        raise
    except RecursionError:
        raise fail("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise fail(f"not valid yaml{where}: {' '.join(str(error.problem).split())}") from None
    except Exception as error:  # what a tag does not fit raises KeyError, AttributeError, ValueError, ...
        raise fail(f"not valid yaml: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise fail(f"expected entries train, val and names, got {short(content)}", "is this the dataset's data.yaml?")
    return content


def read_yolo_info(path: Path, uses: Collection[str] = ()) -> YoloInfo:
    """Read ``data.yaml``.

    Args:
        path: The file.
        uses: What is learnt beside boxes: "segm", "keypoints".

    Raises:
        BadDataError: What is wrong with it, all findings at once.
    """
    content, findings = read_yaml(path), Findings()
    root = _root(path, content.get("path"), findings)
    pictures = {}
    for role, keys in (("train", ("train",)), ("val", ("val", "validation"))):
        value = next((content[key] for key in keys if content.get(key) is not None), None)
        if value is None:
            continue
        entries = value if isinstance(value, list) else [value]
        if entries and all(isinstance(entry, str) and entry.strip() for entry in entries):
            pictures[role] = tuple(entries)
        else:
            problem = f"expected a folder, a text file or a list of them, got {short(value)}"
            findings.error("data.yaml", f"{path}: {role}", problem, "name where the pictures are")
    classes = _classes(path, content, findings)
    num_keypoints, point_size, skeleton = _keypoints(path, content, classes, findings)
    if "keypoints" in uses and not num_keypoints and content.get("kpt_shape") is None:
        problem = "no kpt_shape, but the model learns keypoints"
        findings.error("data.yaml", str(path), problem, "give it, such as kpt_shape: [17, 3]")
    findings.raise_errors()
    return YoloInfo(path, root, pictures, classes, num_keypoints, point_size, skeleton)


def _root(path: Path, given: Any, findings: Findings) -> Path:
    """Return the folder that the entries are relative to: ``path``, which is relative to the file, or the file's."""
    folder = path.absolute().parent
    if given is None:
        return folder
    root = Path(os.path.normpath(folder / given)) if isinstance(given, str) else None
    if root is None or not root.is_dir():
        problem = f"expected a folder, got {short(given)}" + (f", and {root} is none" if root else "")
        remedy = "correct it (it is relative to the yaml file), or leave it out where the yaml lies in that folder"
        findings.error("data.yaml", f"{path}: path", problem, remedy)
    return root or folder


def _classes(path: Path, content: dict[Any, Any], findings: Findings) -> tuple[str, ...]:
    """Return the names of the classes; those of a mapping in the order of their numbers."""
    value, count = content.get("names"), content.get("nc")
    place = f"{path}: names"
    if count is not None:
        try:
            count = _INDEX.read(count)[0]
        except ValueError:
            findings.error("data.yaml", f"{path}: nc", f"expected a number of classes, got {short(count)}", "fix it")
            count = None
    if isinstance(value, dict):
        numbers = []
        for key in value:
            try:
                numbers.append(_INDEX.read(key)[0])
            except ValueError:
                findings.error("data.yaml", place, f"expected class numbers from 0, got {short(key)}", "fix it")
                return ()
        if sorted(numbers) != list(range(len(numbers))):
            problem = f"expected the classes 0 to {len(numbers) - 1}, each once, got {short(sorted(numbers))}"
            findings.error("data.yaml", place, problem, "number them from 0 without gaps")
            return ()
        value = [name for _, name in sorted(zip(numbers, value.values()))]
    if value is None and count:
        return tuple(f"class_{k}" for k in range(count))
    try:
        names = tuple(NAMES.read(value)[0])
        if not names:
            raise ValueError
    except ValueError:
        problem = f"expected different names, got {short(value)}"
        findings.error("data.yaml", place, problem, "name every class once, with quotes round words such as no and on")
        return ()
    if count is not None and count != len(names):
        findings.error("data.yaml", f"{path}: nc", f"nc is {count}, but there are {len(names)} names", "correct one")
    return names


def _keypoints(
    path: Path, content: dict[Any, Any], classes: tuple[str, ...], findings: Findings
) -> tuple[int, int, Skeleton]:
    """Return (keypoints per object, numbers per keypoint, names and mirror map)."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0, 3, Skeleton()
    try:
        first, second = shape
        count, size = _NUM_POINTS.read(first)[0], _POINT_SIZE.read(second)[0]
    except (TypeError, ValueError):
        problem = f"expected [number of keypoints, 2 or 3], got {short(shape)}"
        findings.error("data.yaml", f"{path}: kpt_shape", problem, "fix it: 2 is for x, y and 3 for x, y, v")
        return 0, 3, Skeleton()
    names = _point_names(path, content.get("kpt_names"), count, findings)
    pairs = _flip_pairs(path, content.get("flip_idx"), count, findings)
    persons = infer_flip_pairs(COCO_PERSON_KEYPOINTS)
    if not names and "person" in classes and count == len(COCO_PERSON_KEYPOINTS) and pairs == persons:
        logger.info("17 keypoints of a person that swap as COCO's do: they get COCO's names, and its OKS sigmas")
        names = COCO_PERSON_KEYPOINTS
    if pairs is None:
        return count, size, Skeleton(names, (), implied_pairs(names) if names else None)
    if missing := ignored_pairs(names, pairs):
        implied = ", ".join(f"{names[a]!r} and {names[b]!r}" for a, b in missing)
        problem = f"expected that {implied} swap, as kpt_names say, got {short(content['flip_idx'])}"
        remedy = "correct flip_idx, or leave it out: the names say which points swap"
        findings.error("data.yaml", f"{path}: flip_idx", problem, remedy)
    return count, size, Skeleton(names, (), pairs)


def _point_names(path: Path, value: Any, count: int, findings: Findings) -> tuple[str, ...]:
    """Return the names of the keypoints: a list, or one list per class, which must be the same."""
    if value is None:
        return ()
    lists = list(value.values()) if isinstance(value, dict) else [value]
    try:
        names = tuple(NAMES.read(lists[0])[0]) if lists else ()
    except ValueError:
        names = ()
    if len(names) != count or any(other != lists[0] for other in lists):
        problem = f"expected {count} different names, the same for all classes, got {short(value)}"
        findings.error("data.yaml", f"{path}: kpt_names", problem, "name every keypoint once, or leave it out")
        return ()
    return names


def _flip_pairs(path: Path, value: Any, count: int, findings: Findings) -> tuple[tuple[int, int], ...] | None:
    """Return the pairs of keypoints that swap; None where the file does not say."""
    if value is None or value == []:
        return None
    try:
        order = [_INDEX.read(k)[0] for k in value] if isinstance(value, list) else []
        if sorted(order) != list(range(count)):
            raise ValueError
        pairs = tuple((k, order[k]) for k in range(count) if k < order[k])
        if flip_order(pairs, count).tolist() != order:
            raise ValueError
    except (TypeError, ValueError):
        problem = f"expected each of 0 to {count - 1} once, with partners that point to each other, got {short(value)}"
        findings.error("data.yaml", f"{path}: flip_idx", problem, "give for each keypoint the one it swaps with")
        return None
    return pairs
