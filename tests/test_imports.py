"""How the package's modules import each other, from source: no circle, and a core without engines."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: what stands without an engine; of `smc`, `group`, `captured` and `paging` those that there are
CORE = ("ops", "params", "population", "potentials", "values", "smc", "group", "captured", "paging")


def find_modules(folder, name):
    """Paths by dotted name of all modules below a package's folder; of an extension, its stub's."""
    modules = {}
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyi")]):
        parts = path.relative_to(folder).with_suffix("").parts
        modules[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return modules


def imports(name, path):
    """(module, name in it or None) of all imports of a module, those within functions too, but for type checkers'."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    todo = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((module, alias.name) for alias in node.names)
        else:
            todo += ast.iter_child_nodes(node)


def graph(modules):
    """The modules among `modules` that each imports: `from package import module` is an edge to the module alone."""
    return {
        name: {
            full if (full := f"{module}.{what}") in modules else module
            for module, what in imports(name, path)
            if module in modules or f"{module}.{what}" in modules
        }
        - {name}
        for name, path in modules.items()
    }


def circle(edges):
    """A circle of modules, the first being the last; empty if there is none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


MODULES = find_modules(ROOT / "fastsmc", "fastsmc") | find_modules(ROOT / "kernels", "fastsmc.kernels")


def test_no_module_imports_what_imports_it():
    edges = graph(MODULES)
    assert len(edges) > 50 and "fastsmc.potentials.base" in edges["fastsmc.potentials.product"]
    assert circle(edges) == []


def test_the_core_imports_no_engine():
    edges = graph(MODULES)
    todo = {name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in CORE}
    seen = set()
    while todo:
        seen |= todo
        todo = set().union(*(edges[name] for name in todo)) - seen
    assert {"fastsmc.ops.weigh", "fastsmc.potentials.regex"} <= seen
    engines = {"vllm", "transformers"}
    found = {(name, module) for name in seen for module, _ in imports(name, MODULES[name])}
    assert {(name, module) for name, module in found if module.partition(".")[0] in engines} == set()
    assert not [name for name in seen if name.startswith("fastsmc.vllm")]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("from p import b", "", []),
        ("from p import b", "def f():\n    from p.a import x", ["p.a", "p.b"]),
        ("import p.b", "class C:\n    def f(self):\n        from .a import x", ["p.a", "p.b"]),
        ("from . import b", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a", []),
        ("from p import x", "", []),
    ],
)
def test_circles_are_found(tmp_path, a, b, expected):
    for name, text in (("__init__", "from p import b\n"), ("a", a), ("b", b)):
        (tmp_path / f"{name}.py").write_text(text)
    assert sorted(set(circle(graph(find_modules(tmp_path, "p"))))) == expected
