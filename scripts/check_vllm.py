"""Check unpacked vLLM wheels, without importing them, against what fastsmc uses of vLLM (fastsmc/vllm/names.py).

    python scripts/check_vllm.py PATH…            a .whl, or a folder that contains vllm/, such as site-packages
    python scripts/check_vllm.py --record PATH    adds the version to check_vllm.json

Checks that every name of CALLS and MEMBERS is there with its parameters and attributes, and compares hashes of the
functions in BEHAVIOUR, and the fields of the classes in FIELDS, with those that check_vllm.json holds of each version.
A hash is of the syntax tree without docstrings, comments and annotations, so it changes when the code does.

What changed from one version to the next must have been read: `--record` lists it under "read" of the new version, and
somebody writes there why fastsmc is right on both. The exit status is 0 if every name is there and nothing is unread.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".json")

Function = ast.FunctionDef | ast.AsyncFunctionDef
#: of a syntax tree, what does not change what the code does
UNHASHED = {"type_comment", "type_params", "kind", "ctx", "annotation", "returns"}


def load_names(path: Path = ROOT / "fastsmc" / "vllm" / "names.py") -> ModuleType:
    """Load names.py alone, so that neither fastsmc nor what it requires is imported."""
    spec = importlib.util.spec_from_file_location("names", path)
    assert spec is not None and spec.loader is not None  # of a file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tree:
    """Reads the Python source of a vLLM, in a folder or a wheel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._wheel = zipfile.ZipFile(path) if path.suffix == ".whl" else None
        self._files = set(self._wheel.namelist()) if self._wheel else set()
        self._modules: dict[str, ast.Module | None] = {}
        self.version = self._read_version()

    def read(self, file: str) -> str | None:
        if self._wheel is not None:
            return self._wheel.read(file).decode() if file in self._files else None
        path = self.path / file
        return path.read_text() if path.is_file() else None

    def _read_version(self) -> str:
        text = self.read("vllm/_version.py") or ""
        found = re.search(r"^__version__ = .*?['\"](\d+\.\d+[.\d]*)", text, re.MULTILINE)
        if found is None:
            raise SystemExit(f"{self.path}: neither a wheel of vLLM nor a folder that contains vllm/_version.py")
        return found[1].strip(".")

    def module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            base = name.replace(".", "/")
            text = self.read(f"{base}.py") or self.read(f"{base}/__init__.py")
            ours = name.partition(".")[0] == "vllm"  # a wheel holds nothing else, site-packages does
            self._modules[name] = ast.parse(text) if ours and text is not None else None
        return self._modules[name]

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Module and node of what a module calls `name`, imports followed; None if it is not there."""
        tree = self.module(module)
        if tree is None:
            return None
        stars = []
        for node in statements(tree.body):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in assigned(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                source = self._source(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name and (found := self.find(source, alias.name)) is not None:
                        return found
        return next((found for source in stars if (found := self.find(source, name)) is not None), None)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.read(f"{module.replace('.', '/')}.py") is None
        parts = module.split(".")[: len(module.split(".")) - node.level + package]
        return ".".join([*parts, *(node.module.split(".") if node.module else [])])

    def mro(self, module: str, node: ast.AST) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and those of its bases that are in this tree, in some order that respects inheritance."""
        if not isinstance(node, ast.ClassDef):
            return
        yield module, node
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
            if isinstance(base, ast.Name) and (found := self.find(module, base.id)) is not None:
                yield from self.mro(*found)

    def resolve(self, path: str) -> tuple[str, ast.AST] | None:
        """Module and node of "module:name" or "module:class.method"."""
        module, _, dotted = path.partition(":")
        name, *rest = dotted.split(".")
        found = self.find(module, name)
        for part in rest:
            if found is None:
                return None
            found = next(
                (
                    (where, node)
                    for where, kind in self.mro(*found)
                    for node in statements(kind.body)
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == part
                ),
                None,
            )
        return found

    def parameters(self, path: str) -> list[str] | None:
        """Of a function, or of a class's constructor; None if it is not there."""
        found = self.resolve(path)
        if found is None:
            return None
        if isinstance(found[1], ast.ClassDef):
            if (made := self.resolve(f"{path}.__init__")) is None:
                return self.fields(path)
            found = made
        if not isinstance(found[1], Function):
            return []
        args = found[1].args
        return [arg.arg for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]]

    def fields(self, path: str) -> list[str]:
        """Lists annotated names in the bodies of a class and its bases: fields of dataclasses and structs."""
        return [
            node.target.id
            for _, kind in reversed(list(self.mro(*(self.resolve(path) or ("", ast.Pass())))))
            for node in statements(kind.body)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]

    def members(self, path: str) -> set[str] | None:
        """Lists attributes of a class and its bases, and those that their methods set on self."""
        found = self.resolve(path)
        if found is None:
            return None
        names = set()
        for _, kind in self.mro(*found):
            for node in statements(kind.body):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    names.add(node.name)
                elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                    names |= assigned(node)
            names |= {
                node.attr
                for node in ast.walk(kind)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            }
        return names


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements of a module or class, into `if`, `try` and `with`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def normal(node: Any) -> Any:
    """Writes a syntax tree as nested lists, equal for code that does the same under any Python that can parse it."""
    if isinstance(node, list):
        return [normal(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):  # without docstrings
            value = [s for s in value if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        if name not in UNHASHED and value not in (None, []):
            parts.append([name, normal(value)])
    return [type(node).__name__, parts]


def digest(node: ast.AST) -> str:
    return hashlib.sha256(json.dumps(normal(node)).encode()).hexdigest()[:16]


def missing(tree: Tree, names: ModuleType) -> list[str]:
    """Lists what of CALLS and MEMBERS is not there."""
    out = []
    for path, wanted in names.CALLS.items():
        known = tree.parameters(path)
        if known is None:
            out.append(path)
        elif wanted[:1] == ("self",):
            if tuple(known[: len(wanted)]) != wanted:
                out.append(f"{path}: takes ({', '.join(known)})")
        else:
            out += [f"{path}({name})" for name in wanted if name not in known]
    for path, wanted in names.MEMBERS.items():
        members = tree.members(path)
        out += [path] if members is None else [f"{path}.{name}" for name in wanted if name not in members]
    return out


def measure(tree: Tree, names: ModuleType) -> dict[str, Any]:
    """Returns hashes of BEHAVIOUR and fields of FIELDS, as check_vllm.json keeps them of a version."""
    hashes = {path: digest(found[1]) if (found := tree.resolve(path)) else None for path in names.BEHAVIOUR}
    return {"hashes": hashes, "fields": {path: tree.fields(path) for path in names.FIELDS}}


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Maps a path to what changed between two versions."""
    out = {}
    for path, value in new["hashes"].items():
        if value != old["hashes"].get(path):
            out[path] = "gone" if value is None else "changed" if path in old["hashes"] else "not recorded"
    for path, fields in new["fields"].items():
        known = old["fields"].get(path, [])
        words = [f"new {name}" for name in fields if name not in known]
        words += [f"without {name}" for name in known if name not in fields]
        if words:
            out[f"fields of {path}"] = ", ".join(words)
    return out


def as_number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def check(tree: Tree, names: ModuleType, record: dict[str, Any], say: Any = print) -> bool:
    """Say how a tree differs; whether every name is there and nothing is unread."""
    lacks = missing(tree, names)
    for item in lacks:
        say(f"  missing: {item}")
    found = measure(tree, names)
    versions = sorted(record, key=as_number)
    base = tree.version if tree.version in record else next(
        (v for v in reversed(versions) if as_number(v) < as_number(tree.version)), None
    )  # fmt: skip
    if base is None:
        say(f"  no version before {tree.version} is recorded")
        return False
    differ = changes(record[base], found)
    for path, what in differ.items():
        say(f"  {what} since {base}: {path}")
    read = record[base]["read"]
    unread = [] if differ else [path for path, why in read.items() if not why]
    for path in unread:
        say(f"  changed in {base} and unread: {path}")
    if not differ and not unread:
        say(f"  unchanged since {since(record, versions, base)}" + f" ({len(read)} changes, all read)" * bool(read))
    return not (lacks or differ or unread)


def since(record: dict[str, Any], versions: list[str], version: str) -> str:
    """The first of the versions up to this one between which nothing changed."""
    at = versions.index(version)
    while at and not changes(record[versions[at - 1]], record[versions[at]]):
        at -= 1
    return versions[at]


def add(tree: Tree, names: ModuleType, record: dict[str, Any]) -> dict[str, Any]:
    """The record with this version in it; reasons that were there stay, new changes have an empty one."""
    before = [v for v in sorted(record, key=as_number) if as_number(v) < as_number(tree.version)]
    found = measure(tree, names)
    differ = changes(record[before[-1]], found) if before else {}
    old = record.get(tree.version, {"hashes": {}, "fields": {}, "read": {}})
    again = changes(old, found)
    read = {path: "" if path in again else old["read"].get(path, "") for path in differ}
    record = record | {tree.version: found | {"read": read}}
    return {version: record[version] for version in sorted(record, key=as_number)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path)
    parser.add_argument("--record", action="store_true", help="add these versions to check_vllm.json")
    args = parser.parse_args(arguments)
    names, good = load_names(), True
    for path in args.paths:
        tree = Tree(path)
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        if args.record:
            record = add(tree, names, record)
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"vLLM {tree.version} ({path}):")
        good &= check(tree, names, record)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
