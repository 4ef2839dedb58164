"""bench/: every result file says how it was made, and is written by the one function that knows."""

import ast
import functools
import json
import os
import re
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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


GROUPS_INIT = """
import itertools, time
from types import SimpleNamespace as Some
import numpy as np
from fastsmc import ops
from fastsmc.vllm import runner
class Population:
    def __init__(self, n, T):
        self.n_particles, self.T = n, T
        self.tokens, self.ancestors = np.zeros((T, n), int), np.arange(n)[None].repeat(T, 0)
class SMCParams(dict):
    pass
class LLM:
    def __init__(self, model, *, dtype, kv_cache_memory_bytes, KEYWORDSmax_num_seqs, max_model_len, **more):
        self.request_counter, self.llm_engine, self.renderer = itertools.count(), self, self
        self.running = {}
    def get_tokenizer(self): return self
    def encode(self, text): return [1, 2]
    def generate(self, prompts, params, use_tqdm):
        time.sleep(STOCK)
        return [Some(outputs=[Some(token_ids=[3] * 400)])]
    def smc(self, prompts, params, potentials):
        assert len(potentials) == len(prompts) and len({len(p) for p in prompts}) == min(len(prompts), 41)
        runner.Model().logits(runner.Model().hidden()), ops.weigh()
        time.sleep(0.01 + params["max_tokens"] * (0.002 + SMC * len(prompts)))
        return [Population(params["n_particles"], params["max_tokens"]) for _ in prompts]
    def register_potential(self, potential): return "name"
    def lead_params(self, params, name): return Some(group=True, **params)
    def render_cmpl(self, prompts): return prompts
    def add_request(self, request_id, prompt, params): self.running[request_id] = [params, 0]
    def abort_request(self, ids): self.running = {k: v for k, v in self.running.items() if k not in ids}
    def has_unfinished_requests(self): return bool(self.running)
    def step(self):
        outputs = []
        for request_id, request in list(self.running.items()):
            request[1] += 1
            params, at = request
            group = hasattr(params, "group")
            time.sleep(0.01 if group else 0.002)
            done = at == params.max_tokens
            outputs.append(Some(request_id=request_id, finished=done, outputs=[Some(token_ids=[1] * at)],
                                kv_transfer_params={"smc": {"step": at}} if group else None))
            if done:
                del self.running[request_id]
        return outputs
"""
GROUPS_FILES = {
    **FAKE_FILES,
    "ops.py": "weigh = draw = uniforms = resample = reindex = lambda: None\n",
    "vllm/runner.py": "class Model:\n    def hidden(self): pass\n    def logits(self, hidden): pass\n",
    "potentials.py": "class Lexicon:\n    def __init__(self, *_, **__): pass\nRegex = TextPotential = Lexicon\n",
    "../vllm/__init__.py": "class SamplingParams:\n    def __init__(self, **fields): vars(self).update(fields)\n",
    "../vllm/sampling_params.py": "class RequestOutputKind:\n    CUMULATIVE = 0\n",
}


def test_groups_of_two_trees(tmp_path, monkeypatch, capsys):
    """`bench_groups.py --against`, over trees whose engine only sleeps, for known times; one has the new keywords."""
    import bench_groups
    import tables

    trees = {}
    for name, smc, keywords in (
        ("this", 0.001, "shared_forward='auto', max_particle_rows_per_step=None, "), ("against", 0.004, ""),
    ):  # fmt: skip
        trees[name] = tmp_path / name
        text = GROUPS_INIT.replace("SMC *", f"{smc} *").replace("STOCK", "0.1").replace("KEYWORDS", keywords)
        for file, content in {**GROUPS_FILES, "__init__.py": text}.items():
            path = trees[name] / "fastsmc" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    monkeypatch.setattr(bench_groups, "ROOT", trees["this"])
    monkeypatch.setattr(bench_groups, "GROUP_TOKENS", 8)
    monkeypatch.setattr(bench_groups, "STREAMS", 4)
    path = tmp_path / "groups.json"
    bench_groups.run(
        str(path), max_tokens=8, repeats=2, against=str(trees["against"]), shapes=((4, 2),), groups=(1, 4), n=3,
        bounds=(2,),
    )  # fmt: skip
    check_record(path)
    result = json.loads(path.read_text())
    of = {part: [r for r in result["records"] if r["part"] == part] for part in bench_groups.PARTS}

    (shared,) = of["shared"]
    assert set(shared["ratio"]) == {"stock", "never", "against"} and len(shared["ratio"]["never"]["pairs"]) == 2
    assert shared["ratio"]["stock"]["median"] == pytest.approx(0.1 / 0.058, rel=0.5)
    assert shared["ratio"]["against"]["median"] == pytest.approx(0.154 / 0.058, rel=0.5)
    assert shared["forward_share"] == 0.5

    lines = [r for r in of["outside"] if "us_per_group" in r]
    assert [(r["kind"], r["engine"]) for r in lines] == [
        (kind, tree) for kind in ("lexicon", "mixed") for tree in ("this", "against")
    ]
    assert all(r["us_per_group"] == pytest.approx(4000, rel=0.4) for r in lines[1::2])
    assert all({"hidden", "logits", "weigh", "outside"} <= set(r["step_ms"]) for r in of["outside"] if r not in lines)

    assert [r["engine"] for r in of["beside"]] == ["this", "2 rows", "against"]
    for record in of["beside"]:
        # 6 by what sleeps; a busy machine adds as much to both, which brings them nearer
        assert 1.5 < record["itl_ratio"]["median"] < 8 and 1.5 < record["ttft_ratio"]["median"] < 8
        assert record["group_share"]["stream"]["median"] == pytest.approx(10 / 12, rel=0.4)
        assert record["streams_tokens_per_s"]["with"] < record["streams_tokens_per_s"]["without"]
    assert set(of["beside"][0]["over_against"]) >= {"group, stream", "streams and group"}
    assert capsys.readouterr().out.count("\n") == len(result["records"])
    text = "\n".join(tables.groups(result))
    assert text.count("\n| --- |") == 3 and "of the other tree: group, alone" in text


def test_a_name_that_is_gone_is_said():
    import bench_groups

    with pytest.raises(SystemExit, match=r"json:loads\.nothing, which is not there"):
        bench_groups.Clock("json:loads.nothing")
    clock = bench_groups.Clock("bench_groups:describe")
    with pytest.raises(KeyError):
        bench_groups.describe({})
    assert clock.spent["describe"] > 0


def test_tables_say_what_the_results_say():
    import tables

    for name in tables.FILES:
        check_tables(name)


def check_tables(name):
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


class Words:
    """A tokenizer whose tokens are words, as far as a bench needs one: their checksums in a vocabulary of 64."""

    eos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [zlib.crc32(word.encode()) % 64 for word in re.findall(r"\s*\S+", text)]

    def decode(self, ids, skip_special_tokens):
        return "".join(f" {token}" for token in ids)

    def get_vocab(self):
        return {}


def test_counterfactuals_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    """`bench_counterfactual.py`, found and time: the published procedure agrees with the exact curve."""
    import bench_counterfactual as bench
    import openings
    import tables
    from intervened import EACH
    from machine import write_result
    from tiny import make_llama

    from fastsmc.hf import HFEngine
    from fastsmc.interventions import Steer, Temperature

    for name, value in {
        "MAX_TOKENS": 6, "KEPT": (1, 6), "SAMPLES": 2000, "MISMATCHED": 2, "TOP_K": 8, "TEMPERATURES": (0.5, 1.0),
        "STEER_LAYER": 1, "SAMPLED": ((0, "steering"), (1, "temperature"), (2, "edit")), "COMMON": (2, 100),
    }.items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(openings, "OPENINGS", openings.OPENINGS[:4])
    engine = HFEngine(make_llama(tmp_path / "tiny", 64), Words(), stop_token_ids=[])
    success = bench.Success(engine, bench.Published(engine.trunk.model))

    # the edit of this model can be fitted and scaled; steering, with words that mean nothing, is taken as it comes
    full = bench.RankOne.edit(engine, openings.EDIT_PROMPT, openings.SUBJECT, openings.TRUE, 0, [[*range(64)] * 3])
    level = (success.mean(openings.TRUE, None) + success.mean(openings.TRUE, full)) / 2
    make = functools.partial(bench.scaled, full)
    scale = bench.solve(success, openings.TRUE, make, level, 1.0)
    assert 0 < scale < 1 and success.mean(openings.TRUE, make(scale)) == pytest.approx(level, abs=1e-4)
    with pytest.raises(ValueError, match=r"level=0\.900: is out of reach for Ottawa"):
        bench.solve(success, openings.TRUE, make, 0.9, 1.0)

    def made(*_):
        for target in (openings.TRUE, openings.FALSE):
            yield bench.Change(target, "edit", 1.0, EACH["rank one"])
            for kind, strength in bench.STRENGTHS.items():
                steer = Steer(1, EACH["steer"].vector, 0.2 * strength)
                yield bench.Change(target, kind, strength, steer)
            yield bench.Change(target, "temperature", 0.7, Temperature(0.7))

    monkeypatch.setattr(bench, "changes", made)
    found = bench.bench_found(engine)
    assert [check["df"] >= 2 and check["p"] > 1e-4 for check in found["sampled"]] == [True] * 3
    assert all(len(record["prefix"]) == 4 and 0 < record["mean"] < 6 for record in found["records"])
    assert {d["mean"] > 0 for d in found["differences"] if "steering" in d["more"]} == {True}  # stronger leaves sooner
    for record in found["mismatch"]:
        assert max(record["stated_from_full"], record["stated_from_top_k"]) < 1e-6
        assert min(record["published_from_full"], record["published_from_top_k"]) > 0.01
    timed = bench.bench_time(engine, engine, 4, 1)
    assert {key: len(of) for key, of in timed["records"][0]["seconds"].items()} == dict.fromkeys(
        ("published", "counterfactual", "smc", "smc, steered"), 1
    )
    assert "published" in capsys.readouterr().out

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name, result in {"found": found, "time": timed}.items():
        write_result(tmp_path / f"{name}.json", result)
        check_record(tmp_path / f"{name}.json")
        assert tables.make(name).count("\n| --- |") == {"found": 3, "time": 1}[name]


def test_a_conditional_twist_of_a_tiny_model(tmp_path, monkeypatch):
    """`bench_infill.py amortised`: p0's gaps and the twist's are of the same task."""
    import bench_infill as bench
    import tables
    from machine import write_result
    from tiny import make_llama

    from fastsmc.hf import HFEngine

    result = bench.amortised(HFEngine(make_llama(tmp_path / "tiny", 64), Words(), stop_token_ids=[]), quick=True)
    for length, record in zip((1, 2), result["records"], strict=True):
        for pair in record["pairs"]:
            assert len(pair["tokens"]) == length + 1
            ends = {name: pair[name]["64"] for name in ("base", "twisted")}
            assert all(abs(value - ends["base"][0]) < 1.0 for both in ends.values() for value in both)
            assert pair["base"]["1"] != pair["twisted"]["1"]
        p0, twist = (record[name]["1"]["gap"][0] for name in ("base", "twisted"))
        assert record["gain"]["1"][0] == pytest.approx(p0 - twist)
    write_result(tmp_path / "amortised.json", result)
    check_record(tmp_path / "amortised.json")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.make("amortised").count("\n| ") == 1 + 4


class FakePeer:
    """What `pyvene_bench.py` serves, over the engine of Hugging Face that the other side has, too."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def versions(self):
        return {"pyvene": "0"}

    def interchange(self, bases, sources, sites, basis=None, path=""):
        import numpy as np

        from fastsmc.interventions import Interchange, Subspace

        put = (lambda *site: Interchange(*site)) if basis is None else (lambda *site: Subspace(*site, basis))
        if path:
            logits = self.engine.interchange(bases, sources, [put(*site) for site in sites], logits=True)
            np.save(path, logits.numpy() + 3)  # logits are known up to a constant
        self.calls += [(bases, site) for site in sites]
        return [0.5] * len(sites)

    def train(self, bases, sources, labels, layer, position, steps, total):
        return {"seconds": [0.25] * steps, "loss": [1.0] * steps}

    def generate(self, *_):
        return 40.0


def test_interchange_of_a_tiny_model(tmp_path, monkeypatch):
    """`bench_interchange.py`, all parts, with pairs that no call has seen before."""
    import bench_interchange as bench
    import tables
    from machine import write_result
    from tiny import make_llama

    from fastsmc.alignment.das import Fit
    from fastsmc.alignment.frozen import Frozen
    from fastsmc.hf import HFEngine

    for name, value in {
        "TOKENS": 20, "PAIRS": 2, "LAYER": 1, "RANK": 4, "SAME_LAYERS": (0, 1), "PEER_CONFIGS": 3, "TEXTS": 4,
        "STEERED": ((2, 20, 2, "all"), (1, 3, 2, "generated")), "BATCHES": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    engine, trainer = bench.Engine.__new__(bench.Engine), bench.Trainer.__new__(bench.Trainer)
    engine.llm = trainer.engine = HFEngine(make_llama(tmp_path / "tiny", 64), stop_token_ids=[])
    for owner, method in ((Fit, "step"), (Frozen, "states")):  # the clock's marks go with this test
        monkeypatch.setattr(owner, method, getattr(owner, method))
    trainer.clock = bench.Clock(*bench.STEP)
    peer, draws = FakePeer(engine.llm), bench.Draws({"layers": 2, "hidden": 64, "vocab": 64}, list(range(64)) * 3)
    records = list(bench.same(engine, peer, draws))
    assert len(records) == 6 and max(record["difference"] for record in records) < 1e-5
    records += bench.sweep(engine, peer, draws, 2)
    last, more = records[-2:]
    assert (last["configs"], last["measured"], more["configs"], more["measured"]) == (2, 2, 32, 3)
    assert last["peer_runs"] == [0.5 * 2] * 2 and more["peer_runs"] == pytest.approx([0.5 * 32] * 2)
    swept = peer.calls[6:]
    assert [site for _, site in swept[-3:]] == [[0, -16], [1, -16], [1, -1]]
    assert len({str(bases) for bases, _ in swept}) == 6  # both sweeps, a warm-up and two runs
    records += bench.train(trainer, peer, draws, 1)
    step, epochs = records[-2:]
    assert epochs["steps"] == 6 and epochs["peer_runs"] == [6 * 0.25] and step["peer_runs"] == [0.25]
    assert 0 < 6 * step["seconds"] < epochs["seconds"]
    records += bench.steer(engine, peer, draws, 1, None)
    assert records[-1]["ratio"]["median"] == 40.0 / records[-1]["seconds"]
    assert all(bench.describe(record) for record in records)
    result = {"bench": "interchange", "peer": peer.versions(), "records": records}
    write_result(tmp_path / "made.json", result)
    check_record(tmp_path / "made.json")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.make("made")
    assert "sweep, 16 positions" in text and "pyvene 0 by at most" in text and "of the speed of others" in text
    alone = list(bench.sweep(engine, None, draws, 1)) + list(bench.steer(engine, None, draws, 1, [1]))
    assert not any("ratio" in record for record in alone) and list(bench.same(engine, None, draws)) == []


def test_agreement_is_refused_where_there_is_none():
    import bench_counterfactual as bench
    import numpy as np

    rng, stay = np.random.default_rng(1), np.array([0.9, 0.5, 0.8, 0.999])
    exact = np.cumprod(stay)
    kept = (rng.random((4000, 1)) < exact).sum(1)  # the first so many stay
    assert bench.agreement(kept, exact)[1:] == (4 - 1, pytest.approx(bench.agreement(kept, exact)[2]))
    assert bench.agreement(kept, exact)[2] > 1e-3 > bench.agreement(kept, exact**1.15)[2]
    assert bench.agreement(np.full(9, 4), np.ones(4)) == (0.0, 0, 1.0)


def test_plain_samples_have_the_tokens_of_a_group():
    """Sums in steps: as many samples as fit the tokens that were drawn, also in vain; votes by weight, by the verifier,
    by number; a text is right if it is, line by line and to its end."""
    import segments_accuracy
    from segments import is_right, solution

    numbers = [1, 2, 3]
    assert solution(numbers) == ["1 + 2 = 3", "3 + 3 = 6"]
    texts = {"good": "1 + 2 = 3\n3 + 3 = 6\n\n", "lucky": "1 + 2 = 4\n4 + 3 = 6\n\n", "bad": "1 + 2 = 4\n4 + 3 = 7\n\n"}
    assert is_right(numbers, "1 + 2 = 3\n") and not is_right(numbers, "1 + 2 = 3\n\n")
    assert [is_right(numbers, text) for text in texts.values()] == [True, False, False]
    assert not is_right(numbers, "1 + 2 = 3\n3 + 3 = 6\n6 + 1 = 7\n")
    group = SimpleNamespace(
        tokens=np.array([[5, 5, 5], [5, -1, 5], [5, 5, -1]]),  # 7
        texts=[texts["bad"], texts["good"], texts["bad"]],
        weights=np.array([0.4, 0.6, 0.0]),
        log_weights=np.log([0.4, 0.6, 1e-9]),
    )
    plain = SimpleNamespace(
        token_ids=[[5, 5], [5, 5], [5, 5, 5], [5]], texts=[texts["bad"], "no sum", texts["lucky"], texts["good"]]
    )
    found = segments_accuracy.choose(numbers, group, plain)
    assert (found["tokens"], found["plain_tokens"], found["samples"], found["right_samples"]) == (7, 7, 3, 0)
    assert found["right"] == {
        "smc, heaviest": True, "smc, weight vote": True, "best of n": False, "score vote": False, "majority": False
    }  # fmt: skip
    assert segments_accuracy.vote(["= 1", "= 2", "= 2", "x"], [3.0, 1.0, 1.5, 9.0]) == 1
    low, high = segments_accuracy.interval(np.array([0.0, 1.0] * 50), np.random.default_rng(0))
    assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)
