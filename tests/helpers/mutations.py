"""Changes of one place in a json: a valid file becomes one that users, tools and disks have been seen to make of it."""

import copy
import json

from hypothesis import strategies as st


class Raw(str):
    """Text that stands in the json as it is, such as NaN."""


class KeyTwice(dict):
    """An object whose first key is written twice."""


def dump(value):
    """Return json, with `Raw` and `KeyTwice` as they are meant."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)}: {dump(item)}" for key, item in value.items()]
        return "{" + ", ".join(pairs[:1] * isinstance(value, KeyTwice) + pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(value, at=()):
    """Return the paths of all places in a json value, its own first."""
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*at, key))
    return found


OTHER_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1.0, -0.0, "", " ", "0", "1", "7", "01", "-5", "1.5", "1e3", "x", "7x", "nan", "inf",
    "\u00e9", "\u0661", "\ud800", "a\0b", "../a.png", "b'0'", [], {}, [[]], [None], [0], [1, 2, 3, 4], [[1, 2], [3, 4], [5, 6]], [[1, 2, 2]],
    {"size": [40, 50], "counts": "0"}, {"size": [40, 50], "counts": [2000]}, {"size": [50, 40], "counts": [2000]}, {"x": 1, "y": 2},
    2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**40, 10**400, 1e19, 1e300, -1e300, 1e-300, 4294967297,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("1E400"), Raw("9" * 5000), "9" * 5000, "x" * 100_000,
    [[[[[[1]]]]]], [0] * 1000,
)  # fmt: skip

OPERATIONS = (
    "remove",
    "replace",
    "as text",
    "as float",
    "nest",
    "empty",
    "twice",
    "huge",
    "negative",
    "reverse",
    "swap",
    "key twice",
)


def _parent(value, path):
    for key in path[:-1]:
        value = value[key]
    return value


@st.composite
def mutations(draw, base, most=2):
    """Draw a copy of ``base`` with one or two places changed; returns it with what was done."""
    value, done = copy.deepcopy(base), []
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.sampled_from(places(value)))
        operation = draw(st.sampled_from(OPERATIONS))
        if not at:
            continue
        parent, key = _parent(value, at), at[-1]
        if isinstance(parent, (str, Raw)):
            continue
        old = parent[key]
        done.append(f"{operation} at {at}")
        if operation == "remove":
            del parent[key]
        elif operation == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(OTHER_VALUES)))
        elif operation == "as text":
            parent[key] = old if isinstance(old, str) else json.dumps(old, default=str)
        elif operation == "as float" and isinstance(old, int):
            parent[key] = float(old)
        elif operation == "nest":
            parent[key] = [old]
        elif operation == "empty":
            parent[key] = type(old)() if isinstance(old, (list, dict)) else None
        elif operation == "twice" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(old))
        elif operation in ("huge", "negative") and isinstance(old, (int, float)) and not isinstance(old, bool):
            parent[key] = old * draw(st.sampled_from([1e3, 1e9, 10**9, 1e200])) if operation == "huge" else -old
        elif operation == "reverse" and isinstance(old, list):
            parent[key] = old[::-1]
        elif operation == "swap" and isinstance(parent, dict):
            other = draw(st.sampled_from(sorted(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        elif operation == "key twice" and isinstance(old, dict) and old:
            parent[key] = KeyTwice(old)
    return value, done
