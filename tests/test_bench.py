"""bench/: every result file says how it was made, and is written by the one function that knows."""

import ast
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
RESULTS = sorted(BENCH.glob("results/*.json"))
SCRIPTS = sorted(p for p in BENCH.rglob("*.py") if ".venv" not in p.parts)


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_says_how_it_was_made(path):
    about = check_record(path)
    assert "bench" in about["command"]


def check_record(path):
    """Returns what a result says of how it was made, which must be all of it."""
    from machine import KEYS

    result = json.loads(path.read_text())
    assert result["bench"]
    about = result["machine"]
    missing = [key for key in KEYS if key not in about]
    assert not missing, f"{path.name}: lacks {', '.join(missing)}; measure it again: bash bench/cpu.sh bench/results …"
    assert re.fullmatch(r"[0-9a-f]{40}", about["commit"])
    assert about["cpu"]["name"] and about["processes"] and about["versions"]["torch"]
    assert not re.search(r"[=\s:\"']/\w", json.dumps(about["command"])), "a path"
    return about


def _calls(path, name):
    """Calls of `name`, or of a method of that name, in a script."""
    names = (
        node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    return list(names).count(name)


def test_every_script_writes_through_one_function():
    takes_json = [p for p in SCRIPTS if '"--json"' in p.read_text()]
    assert len(takes_json) >= 8
    for path in takes_json:
        assert _calls(path, "write_result") == 1, path
    for path in SCRIPTS:  # no results: the kernels' configurations, the costs of attend, tables in README files
        assert _calls(path, "dump") == 0, path
        allowed = {"machine.py": 1, "tune.py": 1, "bench_attend.py": 1, "tables.py": 1}.get(path.name, 0)
        assert _calls(path, "write_text") == allowed, path


def test_a_script_measures_and_writes(tmp_path, monkeypatch, capsys):
    """The cheapest one, made small."""
    import bench_order

    for name, value in {"RUNS": 20, "STEPS": 3, "PARTICLES": (8,), "THRESHOLDS": (1.0,)}.items():
        monkeypatch.setattr(bench_order, name, value)
    path = tmp_path / "made" / "order.json"
    records = bench_order.run(str(path))
    assert "moved" in capsys.readouterr().out
    check_record(path)
    result = json.loads(path.read_text())
    assert len(result["records"]) == len(records) == 10
    assert result["records"][0]["inplace"]["variance"] == pytest.approx(records[0]["inplace"]["variance"], rel=1e-6)
    assert len(path.read_text().splitlines()) < 60  # a line a record


def test_what_is_said_is_so(monkeypatch):
    import machine
    import torch

    begin = time.process_time()
    while time.process_time() < begin + 0.3:  # this thread has then been busy
        pass
    about = machine.machine()
    assert about["commit"] is None or len(about["commit"]) == 40  # None: no repository
    ours = about["processes"][0]
    (cpus,) = re.findall(r"Cpus_allowed_list:\s*(\S+)", Path("/proc/self/status").read_text())
    assert cpus in [thread["cpus"] for thread in ours["busy"]] and ours["threads"] >= 1
    assert about["cpu"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert ours["torch_threads"] == torch.get_num_threads()
    assert about["seconds"] > 0 and len(about["load_average"]["start"]) == 3
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["fastsmc"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert machine.machine()["processes"][0]["OMP_NUM_THREADS"] == "7"


def test_a_command_names_no_directory_of_this_machine(monkeypatch, tmp_path):
    import machine

    script = BENCH / "bench_ops.py"
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, str(script), "--json", str(tmp_path / "x.json"), "--a=b c"])
    monkeypatch.setattr(machine, "_environment", {"LD_PRELOAD": "/some/where/libiomp5.so:", "OMP_NUM_THREADS": "2"})
    want = "LD_PRELOAD=libiomp5.so OMP_NUM_THREADS=2 python bench/bench_ops.py --json x.json '--a=b c'"
    assert machine._command() == want


def test_json_has_a_row_a_line():
    from machine import dumps, rounded

    value = {
        "name": "x",
        "nothing": [],
        "list": [1, 2],
        "rows": [{"a": i, "b": [1.0, {"c": None}]} for i in range(3)],
        "deep": [{"long": "y" * 2000, "rows": [{"k": 1}, {"k": 2}]}],
    }
    text = dumps(value)
    assert json.loads(text) == value
    assert sum('"a":' in line for line in text.splitlines()) == 3 and ' {"k": 1},' in text
    assert rounded((0.123456789, {"x": 1 / 3}, 12345678, True)) == [0.1234568, {"x": 0.3333333}, 12345678, True]


FAKE = """
import time
class Tensor:
    def untyped_storage(self): return self
    def data_ptr(self): return 1
    def nbytes(self): return 3_000_000
class LLM:
    def __init__(self, *_, **__): pass
    def get_tokenizer(self): return self
    def encode(self, text): return [1, 2]
    def smc(self, text, params, potential):
        print("noise on stdout")
        potential.logw_next(None)
        runner.Model().hidden(), runner.Model().logits(), ops.weigh()
        time.sleep(SECONDS)
SMCParams = dict
from fastsmc import ops
from fastsmc.vllm import runner
"""
FAKE_FILES = {
    "models.py": "resolve = str\n",
    "ops.py": "weigh = resample = reindex = draw = lambda: None\n",
    "vllm/__init__.py": "",
    "vllm/runner.py": "class Model:\n    def hidden(self): pass\n    def logits(self): pass\n",
    "potentials.py": (
        "from fastsmc import Tensor\n"
        "class Lexicon:\n    def __init__(self, *_, **__): pass\n    def logw_next(self, _): return (Tensor(), None)\n"
        "class Regex(Lexicon):\n    def logw_next(self, _): return (Tensor(), None)\n"
        "class Product(Lexicon):\n    def logw_next(self, _): return (Tensor(), Tensor())\n"
    ),
}


def test_steps_of_two_trees_run_in_turn(tmp_path, monkeypatch, capsys):
    """`bench_step.py --against`, over two trees whose fastsmc only sleeps: each answers for itself."""
    import bench_step

    trees = {}
    for name, seconds in (("this", 0.02), ("against", 0.2)):
        trees[name] = tmp_path / name
        for file, text in {**FAKE_FILES, "__init__.py": FAKE.replace("SECONDS", str(seconds))}.items():
            path = trees[name] / "fastsmc" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.setattr(bench_step, "ROOT", trees["this"])
    path = tmp_path / "step.json"
    bench_step.run(str(path), max_tokens=2, repeats=2, against=str(trees["against"]), particles=(4,))
    result = json.loads(path.read_text())
    *steps, built = result["records"]
    assert [r["potential"] for r in steps] == list(bench_step.POTENTIALS)
    for record in steps:
        assert record["ratio"]["total"] < 0.6 and len(record["ratio"]["pairs"]) == 2
        assert record["this"]["step_ms"]["total"] >= 10 and record["against"]["step_ms"]["total"] >= 100
        assert record["this"]["answer_mb"] == 3.0
        assert {"hidden", "logits", "weigh", "potential", "outside"} <= set(record["against"]["step_ms"])
    assert built["pattern"] == bench_step.BUILT[0] and built["first_call_s"]["against"] >= 0.2
    assert result["against"] == {"commit": None, "changed": None} and "this : against" in capsys.readouterr().out


@pytest.mark.parametrize("name", ("bench/README.md", "README.md"))
def test_tables_say_what_the_results_say(name):
    import tables

    text = (BENCH.parent / name).read_text()
    assert tables.renew(text) == text, f"{name}: run `python bench/tables.py`"


def test_a_table_is_followed_by_its_set_up(tmp_path, monkeypatch):
    import machine
    import tables

    row = {
        "n_particles": 8, "prompt_tokens": 4, "smc_tokens_per_s": 10.4, "stock_tokens_per_s": 5, "ratio": 2.08,
        "forward_share": 0.5,
    }  # fmt: skip
    machine.write_result(tmp_path / "smc_x.json", {"bench": "smc", "records": [row]})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.renew("a\n<!-- smc_x -->\nold\n<!-- /smc_x -->\nb\n<!-- smc_x:rows -->\n<!-- /smc_x:rows -->\nc\n")
    cells = "| 8 | 4 | 10 | 5 | **2.08** | 0.50 |\n"
    assert text.count(cells) == 2 and "old" not in text and text.startswith("a\n") and text.endswith("c\n")
    assert f"{cells}\n*" in text and f"{cells}<!-- /smc_x:rows -->" in text
    about = machine.machine()
    assert about["command"] in text and f"torch {about['versions']['torch']}" in text
    assert tables.renew(text) == text
