"""Checks that what the docs and comments point to is there: `python scripts/check_docs.py`, part of `make check`.

    *.md            relative links, and their anchors, which are GitHub's of the headings
    *.md, sources   names of files in the tree, such as csrc/cpu.cpp; * and ? match, NAME stands for a name of yours
    *.md            dotted names in backticks, such as `fastsmc.models.smollm2`
    all             "§" with a number, which follows docs/mathematics.md and names a section of it

Links to other sites are not followed. Prints one line per fault and exits with status 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".py", ".pyi", ".cpp", ".hpp", ".cu", ".cuh", ".sh", ".toml"}
BUILT = {"build", "dist", "__pycache__", ".venv"}
MATHEMATICS = "docs/mathematics.md"

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
_FILE = re.compile(
    r"(?<![\w/.\-])((?:fastsmc|kernels|csrc|tests|bench|docs|scripts|examples|\.ci)/[\w./*?\-]*[\w*])(?![\w/])"
)
_DOTTED = re.compile(r"`(fastsmc(?:\.\w+)+)")
_INCLUDE = re.compile(r"^#include.*", re.MULTILINE)  # by an include path, which the compiler checks
_SECTION = re.compile(r"§+\s*(\d+)")


def files() -> Iterator[Path]:
    """All documents and sources of the tree, but for what is built and what is hidden (.ci apart)."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts)
        if not hidden and not BUILT.intersection(parts) and path.suffix in SOURCES | {".md"} and path.is_file():
            yield path


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them: a repeated heading gets -1, -2, …"""
    found: dict[str, int] = {}
    for heading in _HEADING.findall(_FENCE.sub("", document.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link shows its text
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, last in found.items() for i in range(last + 1)}


def sections() -> set[str]:
    """Numbers of the sections of docs/mathematics.md."""
    return set(re.findall(r"^## (\d+)\. ", (ROOT / MATHEMATICS).read_text(), re.MULTILINE))


def bad_links(document: Path, text: str) -> Iterator[tuple[int, str]]:
    """(offset, what is wrong) of each link that leads nowhere."""
    fenced = [match.span() for match in _FENCE.finditer(text)]
    for match in _LINK.finditer(text):
        if any(begin <= match.start() < end for begin, end in fenced):
            continue
        target, _, anchor = match[1].partition("#")
        if re.match(r"[a-z][a-z0-9+.\-]*:", target):
            continue
        path = (document.parent / target).resolve() if target else document
        if not path.exists() or not path.is_relative_to(ROOT):
            yield match.start(), f"link to {target}: there is no such file"
        elif anchor and (path.suffix != ".md" or anchor not in anchors(path)):
            yield match.start(), f"link to {match[1]}: {path.name} has no heading with this anchor"


def bad_files(text: str) -> Iterator[tuple[int, str]]:
    """(offset, what is wrong) of each name of a file or folder that is not in the tree."""
    includes = [match.span() for match in _INCLUDE.finditer(text)]
    for match in _FILE.finditer(text):
        name = match[1]
        made = "NAME" in name or not BUILT.isdisjoint(name.split("/"))
        included = any(begin <= match.start() < end for begin, end in includes)
        if not made and not included and not any(True for _ in ROOT.glob(name)):
            yield match.start(), f"{name}: there is no such file"


def bad_names(text: str) -> Iterator[tuple[int, str]]:
    """(offset, what is wrong) of each dotted name whose module is not there, or does not hold the name."""
    for match in _DOTTED.finditer(text):
        path, *rest = match[1].split(".")
        module = ROOT / path
        while rest and ((module / rest[0]).is_dir() or (module / f"{rest[0]}.py").is_file()):
            module /= rest.pop(0)
        if module.name == "kernels":
            module = ROOT / "kernels"
        source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if rest and not (source.is_file() and re.search(rf"\b{rest[0]}\b", source.read_text())):
            yield match.start(), f"{match[1]}: {source.relative_to(ROOT)} has no {rest[0]}"


def bad_sections(text: str, known: set[str], where: Path) -> Iterator[tuple[int, str]]:
    """(offset, what is wrong) of each § that names no section of the mathematics."""
    inside = where == ROOT / MATHEMATICS
    for match in _SECTION.finditer(text):
        before = re.sub(r"[\s#/]+", " ", text[max(0, match.start() - 60) : match.start()]).rstrip(" [(`")
        if not inside and not re.search(r"mathematics\.md(\)|`)?$", before):
            yield match.start(), f"§{match[1]}: must follow {MATHEMATICS}, whose section it names"
        elif match[1] not in known:
            yield match.start(), f"§{match[1]}: {MATHEMATICS} has no such section"


def faults() -> Iterator[str]:
    """One line per fault: file, line, what is wrong."""
    known = sections()
    for path in files():
        text = path.read_text()
        bad = list(bad_files(text))
        if path.suffix == ".md":
            bad += [*bad_links(path, text), *bad_names(text)]
        if path != Path(__file__).resolve():
            bad += bad_sections(text, known, path)
        for offset, what in sorted(bad):
            yield f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, offset) + 1}: {what}"


def main() -> int:
    found = list(faults())
    print("\n".join(found) if found else "docs: every link, file, name and § is there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
