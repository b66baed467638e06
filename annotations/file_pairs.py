"""Pictures and the files beside them that share a stem: found in folders, every file that is not used named."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from annotations.findings import Findings
from pixels.image_files import is_nearly_all, is_picture_name, list_folder, printable, spelling, unreadable_format
from pixels.images import is_text

# (where, what is wrong, what to do) of a file without its partner.
Alone = tuple[str, str, str]


def files_by_stem(
    folder: Path,
    is_wanted: Callable[[str], bool],
    why_not: str,
    findings: Findings,
    is_known: Callable[[str], bool] = lambda name: False,
) -> dict[str, str]:
    """Return {stem in its one spelling: name} of the wanted files below ``folder``; names every other file.

    Args:
        folder: Where to look, to any depth.
        is_wanted: Tells by its name whether a file is wanted.
        why_not: What is said of a file that is not.
        findings: Collects what is wrong.
        is_known: Tells by its name whether a file that is not wanted is at home there, and is not named.
    """
    content = list_folder(folder)
    for name, reason in content.left_out:
        if name == ".":
            findings.error("image folder", str(folder), reason, "let this user read it")
            continue
        findings.warn("stray file", printable(str(folder / name)), reason, "it is not used")
    found: dict[str, str] = {}
    for name in content.files:
        stem = spelling(str(PurePosixPath(name).with_suffix("")))
        if not is_text(name):
            findings.error("pairs", ascii(str(folder / name)), "the file's name is not UTF-8", "rename the file")
        elif not is_wanted(name):
            if not is_known(name):
                findings.warn("stray file", str(folder / name), why_not, "it is not used")
        elif stem not in found:
            found[stem] = name
        elif unreadable_format(name) or unreadable_format(found[stem]):  # a phone's .heic beside its .jpg
            used, unused = (found[stem], name) if unreadable_format(name) else (name, found[stem])
            problem = f"{PurePosixPath(used).name} has the same stem, and {unreadable_format(unused)}"
            findings.warn("stray file", str(folder / unused), problem, "it is not used")
            found[stem] = used
        else:
            problem = f"{PurePosixPath(found[stem]).name} has the same stem"
            findings.error("pairs", str(folder / name), problem, "give every file its own stem")
    return found


class SimilarStems:
    """Tells which file without a partner may be meant by a stem that has none.

    Args:
        others: Stems without a partner.
        name_of: {stem: name}.
        folder: Where they are.
    """

    def __init__(self, others: Iterable[str], name_of: dict[str, str], folder: Path) -> None:
        self.name_of, self.folder = name_of, folder
        self.of_key: dict[tuple[str, str], list[str]] = {}
        for other in others:
            for key in self._keys(other):
                self.of_key.setdefault(key, []).append(other)

    @staticmethod
    def _keys(stem: str) -> list[tuple[str, str]]:
        """Return what is equal of stems that differ in some way."""
        plain = stem.rpartition(".")[0] if is_picture_name(stem) else stem
        return [
            ("differs in upper and lower case", stem.casefold()),
            ("differs by a picture's suffix in its name", plain),
            ("lies in another sub-folder", PurePosixPath(stem).name),
        ]

    def of(self, stem: str) -> str:
        """Say which one file may be meant, or nothing."""
        for reason, key in self._keys(stem):
            if len(found := self.of_key.get((reason, key), [])) == 1:
                return f"; {self.folder / self.name_of[found[0]]} {reason}"
        return ""


def missing_partner(findings: Findings, place: str, problem: str, remedy: str) -> None:
    """Report a file without its partner; with "skip" it is just not used."""
    if findings.on_bad_data == "skip":
        findings.warn("pairs", place, problem, "the file is not used")
    else:
        findings.error("pairs", place, problem, remedy)


def missing_partners(findings: Findings, folder: Path, alone: Sequence[Alone], total: int, elsewhere: str = "") -> None:
    """Report the files of a folder without their partner: a line each, or one for all where hardly any has one.

    Args:
        findings: Collects what is wrong.
        folder: Where the files are, or what lists them.
        alone: Each of them.
        total: How many files there are.
        elsewhere: Where their partners are, as a remedy; empty where that is not known.
    """
    if not is_nearly_all(len(alone), total):
        for place, problem, remedy in alone:
            missing_partner(findings, place, problem, remedy)
        return
    place, problem, remedy = alone[0]
    problem = f"{len(alone)} of {total} belong to no file, such as {place}: {problem}"
    if len(alone) < total:
        missing_partner(findings, str(folder), problem, elsewhere or remedy)
    else:  # nothing would be left
        findings.error("pairs", str(folder), problem, elsewhere or remedy)


def folder_with_stems(folders: Iterable[Path], stems: Collection[str]) -> Path | None:
    """Return the folder with the most files of some stems, if it has most of them; none of an empty lot."""
    counts = {
        folder: len(
            {spelling(str(PurePosixPath(name).with_suffix(""))) for name in list_folder(folder).files} & set(stems)
        )
        for folder in folders
    }
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best is not None and 2 * counts[best] > len(stems) else None
