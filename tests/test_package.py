"""What a user installs: the package's metadata, its types, and the stub of the extension."""

import ast
import hashlib
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import fastsmc
from fastsmc import cli

ROOT = Path(__file__).parents[1]


def test_licence_and_version(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    licence = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()  # of Apache's own LICENSE-2.0.txt
    assert licence == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert f"## [{fastsmc.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"fastsmc {fastsmc.__version__}\n"


def test_what_a_wheel_holds_is_declared():
    """Every file beside the modules that the package reads, or that a type checker reads, is package data."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: ROOT / name.replace(".", "/") for name in table["packages"]} | {
        name: ROOT / folder for name, folder in table["package-dir"].items()
    }
    packages = {path.parent for path in (ROOT / "fastsmc").rglob("*.py") if path.parent.name != "kernels"}
    assert packages <= set(folders.values())
    for name, folder in folders.items():
        files = {path for path in folder.glob("*") if path.suffix in (".html", ".json", ".pyi", ".typed")}
        declared = {path for glob in table["package-data"].get(name, ()) for path in folder.glob(glob)}
        assert files == declared, name
    assert ROOT / "fastsmc" / "py.typed" in folders["fastsmc"].iterdir()


def test_stub_of_the_extension():
    """fastsmc/_C.pyi has the names of fastsmc._C, and functions as many parameters; CUDA's, where they are built."""
    pytest.importorskip("fastsmc.ops", reason="the extension is not built")
    from fastsmc import _C

    tree = ast.parse((ROOT / "fastsmc" / "_C.pyi").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    values = {
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and getattr(node.annotation, "id", "") != "TypeAlias"
    }
    expected = {name for name in (*functions, *values) if _C.cuda_archs or not re.match("cuda_(?!archs)", name)}
    assert {name for name in dir(_C) if not name.startswith("_")} == expected
    for name, node in functions.items():
        if name in expected:
            assert inspect.isbuiltin(getattr(_C, name))
            signature = getattr(_C, name).__doc__.splitlines()[0]
            assert len(re.findall(r"\barg\d+:", signature)) == len(node.args.posonlyargs), name
            returned = ast.unparse(node.returns).replace("NDArray[np.int32]", "NDArray[numpy.int32]")
            assert signature.rsplit(" -> ", 1)[1].endswith(returned), name


def test_entry_points_are_potentials():
    entries = importlib.metadata.entry_points(group="fastsmc.potentials")
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["fastsmc.potentials"]
    assert set(names) <= {entry.name for entry in entries}
    assert all(issubclass(entry.load(), fastsmc.Potential) for entry in entries if entry.name in names)
