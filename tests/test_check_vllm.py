"""scripts/check_vllm.py, and that fastsmc/vllm/names.py is complete: without an engine, from source."""

import ast
import importlib.util
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_vllm = load(ROOT / "scripts" / "check_vllm.py")
names = load(ROOT / "fastsmc" / "vllm" / "names.py")

QUEUE = '''
from __future__ import annotations

import dataclasses

from .base import *


@dataclasses.dataclass
class Job(Base[int]):
    """A job."""

    weight: float = 1.0
    """In grams."""

    def pop(self, first: int, *, wait=False) -> int:
        """Takes a job."""
        # the oldest
        self.taken, self.when = first, 0
        return first + 1
'''
BASE = """
class Base(Generic[T]):
    name: str

    def free(self):
        self.done = True
"""
SMALL = SimpleNamespace(
    CALLS={
        "vllm.sched:Job.pop": ("self", "first"),
        "vllm.sched.queue:Job": ("name", "weight"),
        "vllm.sched:Job.free": (),
    },
    MEMBERS={"vllm.sched:Job": ("weight", "name", "taken", "when", "done", "pop")},
    BEHAVIOUR={"vllm.sched:Job.pop": "", "vllm.sched.queue:Base.free": ""},
    FIELDS=("vllm.sched:Job",),
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script on a small tree that takes the place of vLLM: (exit status, what it says)."""
    monkeypatch.setattr(check_vllm, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(check_vllm, "load_names", lambda: SMALL)

    def run(version, queue=QUEUE, base=BASE, options=(), wheel=False):
        folder = tmp_path / f"{version} {len(list(tmp_path.iterdir()))}"
        files = {
            "vllm/_version.py": f"__version__ = version = '{version}'\n",
            "vllm/sched/__init__.py": "if True:\n    from vllm.sched.queue import Job\n",
            "vllm/sched/queue.py": queue,
            "vllm/sched/base.py": base,
        }
        if wheel:
            folder = folder.with_suffix(".whl")
            with zipfile.ZipFile(folder, "w") as archive:
                for name, text in files.items():
                    archive.writestr(name, text)
        else:
            for name, text in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        status = check_vllm.main([*options, str(folder)])
        return status, capsys.readouterr().out

    return run


def test_an_equal_version_is_unchanged_however_it_is_written(run):
    assert run("0.1.0", options=["--record"])[0] == 0
    other = QUEUE.replace("Takes a job.", "Takes one.").replace("# the oldest", "").replace("In grams.", "In ounces.")
    other = other.replace("first + 1", "(first +\n            1)").replace("first: int", "first: Any")
    for version, wheel in (("0.1.0", True), ("0.1.1", False), ("0.2.0rc1", True)):
        status, said = run(version, other, wheel=wheel)
        assert status == 0 and "unchanged since 0.1.0" in said


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("first + 1", "first + 2", "changed since 0.1.0: vllm.sched:Job.pop"),
        ("first + 1", "first - 1", "changed since 0.1.0: vllm.sched:Job.pop"),
        ("wait=False", "wait=True", "changed since 0.1.0: vllm.sched:Job.pop"),
        ("self.done = True", "self.done = False", "changed since 0.1.0: vllm.sched.queue:Base.free"),
        ("def free", "def release", "gone since 0.1.0: vllm.sched.queue:Base.free"),
        ("weight: float = 1.0", "weight: float = 1.0\n    colour: str = ''", "new colour since 0.1.0: fields of"),
        ("name: str", "title: str", "missing: vllm.sched.queue:Job(name)"),
        ("name: str", "title: str", "missing: vllm.sched:Job.name"),
        ("first: int, ", "second, first: int, ", "missing: vllm.sched:Job.pop: takes (self, second, first, wait)"),
        ("self.taken, self.when", "self.taken, when", "missing: vllm.sched:Job.when"),
        ("def pop", "def take", "missing: vllm.sched:Job.pop"),
        ("class Job", "class Task", "missing: vllm.sched:Job\n"),
    ],
)
def test_what_differs_is_named(run, old, new, said):
    assert run("0.1.0", options=["--record"])[0] == 0
    assert (old in QUEUE) != (old in BASE)
    status, text = run("0.2.0", QUEUE.replace(old, new), BASE.replace(old, new))
    assert status == 1 and said in text


def test_a_recorded_change_has_to_be_read(run):
    run("0.1.0", options=["--record"])
    newer = QUEUE.replace("first + 1", "first + 2")
    status, said = run("0.2.0", newer, options=["--record"])
    assert status == 1 and "changed in 0.2.0 and unread: vllm.sched:Job.pop" in said
    record = json.loads(check_vllm.RECORD.read_text())
    assert record["0.2.0"]["read"] == {"vllm.sched:Job.pop": ""}
    record["0.2.0"]["read"]["vllm.sched:Job.pop"] = "we do not call it"
    check_vllm.RECORD.write_text(json.dumps(record))
    assert run("0.2.0", newer)[0] == 0
    assert run("0.2.1", newer)[0] == 0
    # recording it again keeps the reason, unless the code has changed once more
    assert run("0.2.0", newer, options=["--record"])[0] == 0
    assert run("0.2.0", QUEUE.replace("first + 1", "first + 3"), options=["--record"])[0] == 1
    assert run("0.1.0")[0] == 0


def test_a_folder_without_vllm_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="neither a wheel of vLLM"):
        check_vllm.main([str(tmp_path)])


# ------------------------------------------------------------------------------------------------ the real ones
def test_the_installed_vllm_is_one_that_is_known(tmp_path, capsys):
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("vLLM is not installed")
    installed = Path(spec.origin).parent
    assert check_vllm.main([str(installed.parent)]) == 0, capsys.readouterr().out
    assert "unchanged since" in capsys.readouterr().out

    # the same tree, but for one file
    where = Path("v1/core/sched/scheduler.py")
    copy, theirs = tmp_path / "vllm", installed
    for part in (*where.parts[:-1], where.name):
        copy.mkdir()
        for item in theirs.iterdir():
            if item.name != part:
                (copy / item.name).symlink_to(item)
        copy, theirs = copy / part, theirs / part
    text = (
        theirs.read_text().replace("def _preempt_request(", "def _preempt(").replace("self.max_num_running_reqs", "_")
    )
    copy.write_text(text)
    assert check_vllm.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "missing: vllm.v1.core.sched.scheduler:Scheduler._preempt_request\n" in said
    assert "missing: vllm.v1.core.sched.scheduler:Scheduler.max_num_running_reqs\n" in said
    assert "changed since" in said and "Scheduler.schedule\n" in said
    assert "free_blocks" not in said and "worker" not in said


def test_every_supported_version_is_recorded():
    from packaging.specifiers import SpecifierSet

    from fastsmc.vllm import compat

    record = json.loads(check_vllm.RECORD.read_text())
    assert list(SpecifierSet(compat.SUPPORTED).filter(record)) == list(record)
    next_minor = max(int(version.split(".")[1]) for version in record) + 1
    assert f"0.{next_minor}.0" not in SpecifierSet(compat.SUPPORTED)
    for version in record.values():
        assert set(version["hashes"]) == set(names.BEHAVIOUR) and set(version["fields"]) == set(names.FIELDS)
        assert all(version["hashes"].values()) and all(version["read"].values())


def test_every_import_from_vllm_is_in_names():
    known = {path for table in (names.CALLS, names.MEMBERS) for path in table}
    modules = {path.partition(":")[0] for path in known}
    heads = {f"{module}:{name.split('.')[0]}" for module, _, name in (path.partition(":") for path in known)}
    anywhere = {head.partition(":")[2] for head in heads}
    checked = 0
    for file in sorted((ROOT / "fastsmc").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    there = f"{node.module}:{alias.name}" in heads or f"{node.module}.{alias.name}" in modules
                    public = node.module == "vllm" and alias.name in anywhere
                    assert there or public, f"{file.name}: {node.module}:{alias.name} is not in fastsmc/vllm/names.py"
                    checked += 1
    assert checked > 20


def test_only_a_server_loads_its_front_end():
    """Names of vLLM's HTTP modules are not probed in workers, or where there is no server."""
    modules = {path.partition(":")[0] for table in (names.CALLS, names.MEMBERS) for path in table}
    assert set(names.ONLY.values()) == {"cpu", "cuda", "server"} and set(names.ONLY) <= modules
    front = {name for name in modules if name.startswith(("vllm.entrypoints.", "vllm.plugins."))}
    assert {name for name in front if names.ONLY.get(name) != "server"} == {"vllm.entrypoints.llm"}
