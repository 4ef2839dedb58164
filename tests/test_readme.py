"""Code and commands of the documents: that names and options are there, and that the check of the docs finds faults.

The README's Python runs in tests/engine/test_real_model.py, on an engine that other tests share.
"""

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib

import pytest
from documents import ROOT, blocks

from fastsmc import cli

DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for pattern in ("*.md", "docs/*.md", "bench/*.md") for path in ROOT.glob(pattern)
)


def commands(document):
    """Commands of a document's bash blocks, comments left out and continued lines joined, as lists of words."""
    for block in blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document):
    """`fastsmc …` is parsed by the command line's own parser; `make …` is a target; what Python runs is there."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands(document):
        if words[0].endswith("fastsmc"):
            cli.make_parser().parse_args(words[1:])
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        elif words[0].rpartition("/")[2].startswith("python") and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words
    for extra in re.findall(r"'\.\[(\w+)\]'", (ROOT / document).read_text()):
        assert extra in extras


def test_commands_are_found():
    first = [words[0] for words in commands("README.md")]
    assert first.count("make") >= 2 and first.count(".venv/bin/fastsmc") >= 3


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if blocks(name, "python")])
def test_imports_of_python_blocks(document):
    """Every module and name is there; `fastsmc.LLM`, which brings vLLM along, is only looked for."""
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(alias.name) for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    known = alias.name in getattr(module, "__all__", ()) or hasattr(module, alias.name)
                    assert known or importlib.util.find_spec(f"{node.module}.{alias.name}"), (document, alias.name)


def test_the_docs_check_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    """scripts/check_docs.py on a small tree, right and wrong. (It also reads this file: hence names in pieces.)"""
    spec = importlib.util.spec_from_file_location("check_docs", ROOT / "scripts" / "check_docs.py")
    check_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_docs)
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    section, maths, package = "\N{SECTION SIGN}", "docs/mathematics.md", "fastsmc" + "/"
    (tmp_path / "docs").mkdir()
    (tmp_path / package).mkdir()
    (tmp_path / maths).write_text(f"# M\n\n## 1. Target\n\nAs in {section}1.\n")
    (tmp_path / package / "a.py").write_text(f'"""After {maths} {section}1, of {package}a.py."""\n\n\ndef f(): ...\n')
    page = tmp_path / "page.md"
    good = (
        f"# A page\n\n## Twice `x`\n\n## Twice `x`\n\n[1]({maths}#1-target) [2](#twice-x-1) "
        f"[3](https://nowhere.invalid/x) `fastsmc.a.f()` and {package}*.py\n\n```\n[4](nowhere.md)\n```\n"
    )
    page.write_text(good)
    assert check_docs.main() == 0
    capsys.readouterr()
    for text, what in {
        "[x](nowhere.md)": "nowhere.md: there is no such file",
        f"[x]({maths}#2-none)": "no heading with this anchor",
        package + "none.cpp": "none.cpp: there is no such file",
        "`fastsmc.a.g`": f"{package}a.py has no g",
        f"{maths} {section}2": f"{section}2: {maths} has no such section",
        f"the paper's {section}1": f"{section}1: must follow {maths}",
    }.items():
        page.write_text(f"{good}\n{text}\n")
        assert check_docs.main() == 1
        out = capsys.readouterr().out
        assert what in out and out.startswith("page.md:13: ") and out.count("\n") == 1, out
