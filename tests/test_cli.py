"""The command line, as far as it needs no engine: a stand-in for `fastsmc.LLM` gives the populations."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsmc
from fastsmc import Population, SMCParams, cli
from fastsmc.smc import SMCError


def some_population(params):
    n = params.n_particles
    log_weights = np.log(np.arange(1.0, n + 1))
    return Population(
        token_ids=[[i, 7] for i in range(n)],
        log_weights=log_weights,
        log_z=-0.5,
        log_probs=np.full(n, -2.0),
        token_log_probs=np.full((n, 2), -1.0),
        ess=[n, n / 2],
        resampled=[False, False],
        ancestors=np.tile(np.arange(n), (2, 1)),
        tokens=np.stack([np.arange(n), np.full(n, 7)]),
        step_log_weights=np.tile(log_weights, (2, 1)),
        prompt_token_ids=[1],
        params=params,
        texts=[f"text {i}\n" + "long " * 50 for i in range(n)],
    )


#: what an engine on the CPU starts with unless asked otherwise
EAGER = {} if torch.cuda.is_available() else {"enforce_eager": True}


class FakeLLM:
    """Notes what it was called with; says much, as engines do."""

    calls: list
    error: Exception | None = None
    at_start: Exception | None = None

    def __init__(self, model, **kwargs):
        self.calls.append(("init", model, kwargs))
        os.write(1, b"(EngineCore pid=7) INFO 11-26 00:00:00 [core.py:1] starting\n")
        os.write(2, b"UserWarning: foreign\n")
        if self.at_start is not None:
            raise self.at_start

    def shutdown(self):
        self.calls.append("shutdown")

    def smc(self, prompt, params, potential=None, use_tqdm=False, **more):
        self.calls.append(("smc", prompt, params, potential, use_tqdm, *([more] if more else [])))
        if self.error is not None:
            raise self.error
        return some_population(params)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fresh = type("FreshLLM", (FakeLLM,), {"calls": []})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where logs go
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    monkeypatch.setitem(vars(fastsmc), "LLM", fresh)  # setattr would look at the real one first, and import vLLM
    return fresh


def test_run(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    files = {option: str(tmp_path / f"out.{option}") for option in ("json", "save")}
    arguments = ["run", "--model", "m", "--prompt", "Hello", "--particles", "4", "--max-tokens", "2", "--seed", "9"]
    arguments += ["--json", files["json"], "--save", files["save"], "--plot", str(tmp_path / "p.svg"), "--best", "3"]
    assert cli.main(arguments) == 0
    expected = SMCParams(n_particles=4, max_tokens=2, seed=9)
    assert fake.calls == [("init", "m", EAGER), ("smc", "Hello", expected, None, False), "shutdown"]
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "0.4000" in lines[1] and "text 3\\n" in lines[1] and "…" in lines[1]
    assert all(len(line) <= 60 for line in lines) and len([x for x in lines if "text " in x]) == 3
    assert (
        "log Ẑ -0.5000   ESS 3.3 of 4, 4 roots" in out and "no standard error: not known" in out and "tokens/s" in out
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["token_ids"] == [[i, 7] for i in range(4)]
    assert result["weights"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (result["log_z"], result["ess"], result["prompt"]) == (-0.5, [4, 2], "Hello")
    assert Population.load(files["save"]).params == expected
    assert (tmp_path / "p.svg").exists() and (tmp_path / "p-genealogy.svg").exists()


def test_run_with_as_many_islands_as_needed(fake, capsys, monkeypatch):
    def smc(self, prompt, params, potential=None, use_tqdm=False, **more):
        self.calls.append(more)
        islands = [some_population(dataclasses.replace(params, group=k)) for k in range(9)]
        pools = [Population.pool(islands[:k]) for k in (8, 9)]
        return dataclasses.replace(pools[1], pilot=pools[0], capped=True)

    monkeypatch.setattr(fake, "smc", smc)
    arguments = ["run", "--prompt", "x", "--particles", "4", "--n-particles", "auto", "--target-stderr", "0.2"]
    assert cli.main([*arguments, "--max-particles", "100"]) == 0
    assert fake.calls[1] == {"n_particles": "auto", "target_stderr": 0.2, "max_particles": 100}
    out = capsys.readouterr().out
    assert "of 36, 36 roots" in out and "9 islands, by 8 pilots; --max-particles allowed no more" in out
    assert "no standard error: all islands have the same Ẑ" in out


def test_run_with_islands(fake, capsys, monkeypatch):
    def smc(self, prompt, params, potential=None, use_tqdm=False, **more):
        self.calls.append(more)
        return Population.pool([some_population(dataclasses.replace(params, group=k)) for k in range(3)])

    monkeypatch.setattr(fake, "smc", smc)
    assert cli.main(["run", "--prompt", "x", "--particles", "600", "--islands", "3"]) == 0
    assert "max_num_seqs" not in fake.calls[0][2] and fake.calls[1] == {"islands": 3}
    assert "3 islands" in capsys.readouterr().out
    fake.calls.clear()
    arguments = ["run", "--prompt", "x", "--particles", "600", "--islands", "3", "--migrate-every", "4"]
    assert cli.main(arguments) == 0  # which the engine has at once
    assert fake.calls[0][2]["max_num_seqs"] == 1800 and fake.calls[1] == {"islands": 3, "migrate_every": 4}


def test_run_passes_everything_on(fake):
    options = [
        "--temperature",
        "0.5",
        "--ess-threshold",
        "1",
        "--resampling",
        "ssp",
        "--resample-every",
        "4",
        "--resampling-temperature",
        "entropic",
        "--proposal",
        "base",
        "--power",
        "2",
        "--power-ramp",
        "0.5,2",
        "--ignore-eos",
        "--particles",
        "2000",
    ]
    assert cli.main(["run", "--model", "m", "--prompt", "x", *options, "--engine-args", '{"dtype": "float32"}']) == 0
    assert fake.calls[0][2] == {"dtype": "float32", "max_num_seqs": 2000, **EAGER}
    assert fake.calls[1][2] == SMCParams(
        n_particles=2000, temperature=0.5, ess_threshold=1.0, resampling="ssp", proposal="base", ignore_eos=True,
        resample_every=4, resampling_temperature="entropic", power=2.0, power_ramp=(0.5, 2.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["walk"], "invalid choice"),
        (["run"], "--prompt"),
        (["run", "--prompt", ""], "--prompt"),
        (["run", "--prompt", "x", "--particles", "many"], "--particles"),
        (["run", "--prompt", "x", "--particles", "0"], "n_particles=0"),
        (["run", "--prompt", "x", "--temperature", "0"], "temperature"),
        (["run", "--prompt", "x", "--ess-threshold", "nan"], "ess_threshold"),
        (["run", "--prompt", "x", "--resampling", "coin"], "coin"),
        (["run", "--prompt", "x", "--resample-every", "0"], "resample_every=0"),
        (["run", "--prompt", "x", "--resampling-temperature", "0.5"], "resampling_temperature=0.5"),
        (["run", "--prompt", "x", "--resampling-temperature", "hot"], "--resampling-temperature"),
        (["run", "--prompt", "x", "--power", "0"], "power=0.0"),
        (["run", "--prompt", "x", "--power", "2", "--power-ramp", "1,3"], "power_ramp=(1.0, 3.0)"),
        (["run", "--prompt", "x", "--power-ramp", "two"], "--power-ramp 'two'"),
        (["run", "--prompt", "x", "--seed", "-1"], "seed"),
        (["run", "--prompt", "x", "--n-particles", "64"], "--n-particles"),
        (["run", "--prompt", "x", "--islands", "0"], "islands=0"),
        (["run", "--prompt", "x", "--migrate-every", "2"], "migrate_every=2: needs islands"),
        (["run", "--prompt", "x", "--islands", "2", "--n-particles", "auto"], "leave islands=2 out"),
        (["run", "--prompt", "x", "--target-stderr", "0.1"], "target_stderr=0.1: needs n_particles='auto'"),
        (["run", "--prompt", "x", "--n-particles", "auto", "--max-particles", "9"], "max_particles=9"),
        (["run", "--prompt", "x", "--best", "-1"], "--best"),
        (["run", "--prompt", "x", "--potential", "absent"], "'absent'"),
        (["run", "--prompt", "x", "--potential", "regex", "--potential-args", "{"], "not JSON"),
        (["run", "--prompt", "x", "--potential", "regex", "--potential-args", "[1]"], "JSON object"),
        (["run", "--prompt", "x", "--potential-args", '{"a": 1}'], "without --potential"),
        (["run", "--prompt", "x", "--engine-args", "3"], "JSON object"),
        (["run", "--prompt", "x", "--json", "no/such/directory/x.json"], "no directory"),
        (["run", "--prompt", "x", "--save", "."], "cannot be written"),
        (["run", "--prompt", "x", "--plot", "x.docx"], "unknown suffix"),
        (["bench"], "which"),
        (["bench", "everything"], "everything"),
    ],
)
def test_bad_input_is_one_line_and_status_2(fake, capsys, arguments, message):
    try:
        status = cli.main(arguments)
    except SystemExit as error:  # argparse
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and not fake.calls
    assert message in err and err.count("\n") == 1 and err.startswith("fastsmc")


def test_errors_of_the_engine(fake, capsys):
    for error, status in ((SMCError("potential X\n at step 3"), 1), (ValueError("n_particles: too many"), 2)):
        fake.error = error
        assert cli.main(["run", "--model", "m", "--prompt", "x"]) == status
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("fastsmc run: error: ")
    fake.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["run", "--model", "m", "--prompt", "x"])


RUN = ["run", "--model", "m", "--prompt", "x"]


def test_the_screen_shows_our_own_words_only(fake, tmp_path, capfd, monkeypatch):
    assert cli.main(RUN) == 0
    out, err = capfd.readouterr()
    assert out.startswith("  weight") and "tokens/s" in out and not err
    (log,) = (tmp_path / "cache" / "fastsmc" / "logs").iterdir()
    assert "starting" in log.read_text() and "foreign" in log.read_text()
    for loud in ([*RUN, "--verbose"], RUN):
        assert cli.main(loud) == 0
        out, err = capfd.readouterr()
        assert "starting" in out and "tokens/s" in out and "foreign" in err
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")


def test_an_engine_that_does_not_start_is_one_line_with_the_log(fake, tmp_path, capfd):
    for error in (TypeError("unexpected 'a'"), AssertionError(), KeyError("k"), RuntimeError("two\nlines")):
        fake.at_start = error
        assert cli.main([*RUN, "--engine-args", '{"enforce_eager": false}']) == 2
        assert fake.calls[-1] == ("init", "m", {"enforce_eager": False})
        out, err = capfd.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("fastsmc run: error: the engine did not start")
        assert str(error.args[0] if error.args else "AssertionError").split()[0] in err
        log = Path(err.rsplit("(log: ", 1)[1].strip().rstrip(")")).read_text()
        assert type(error).__name__ in log and "Traceback" in log


def test_an_engine_that_dies(fake, capfd):
    fake.error = type("EngineDeadError", (Exception,), {})("EngineCore encountered an issue")
    assert cli.main(RUN) == 2
    out, err = capfd.readouterr()
    assert not out and err.count("\n") == 1 and "the engine died: EngineCore encountered an issue (log: " in err
    assert fake.calls[-1] == "shutdown"


def test_bench(tmp_path, monkeypatch, capsys):
    package, scripts = tmp_path / "fastsmc", tmp_path / "bench"
    package.mkdir()
    monkeypatch.setattr(fastsmc, "__file__", str(package / "__init__.py"))
    assert cli.main(["bench", "ops"]) == 2
    assert "source tree" in capsys.readouterr().err
    scripts.mkdir()
    (scripts / "bench_ops.py").write_text("def run(json_path=None):\n    print('ran', json_path)\n")
    assert cli.main(["bench", "ops", "--json", str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == f"ran {tmp_path / 'x.json'}\n"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("fastsmc", "torch", "vllm", "extension", "threads", "potentials"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["fastsmc"] == fastsmc.__version__ and isinstance(info["extension_built"], bool)
    assert ("cuda" in info["backends"]) == bool(info["cuda_archs"])


def test_info_without_vllm_and_without_the_extension():
    code = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'vllm' or name == 'fastsmc._C':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from fastsmc.cli import main\n"
        "sys.exit(main(['info', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["extension_built"] is False


# -- twists ------------------------------------------------------------------------------------------------------------
TRAIN = '{"loss": "ctl", "kind": "linear", "steps": 6, "refresh": 3, "batch_size": 64, "eval_every": 3, "eval_runs": 2}'


@pytest.fixture
def tiny_model(tmp_path):
    """A random Llama with a tokenizer of eight words."""
    from tiny import make_llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = make_llama(tmp_path / "model", 8)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w7").save_pretrained(path)
    return str(path)


def test_train_twist_and_evaluate(tiny_model, tmp_path, capsys, monkeypatch):
    """Both commands on a real, tiny model; evaluation over Hugging Face in the place of vLLM."""
    from fastsmc.hf import HFEngine

    task = ["--model", tiny_model, "--prompt", "w1 w2", "--max-tokens", "3", "--particles", "64"]
    lexicon = ["--potential", "lexicon", "--potential-args", '{"token_ids": [1, 2], "weight": -1.5}']
    out = str(tmp_path / "twist")
    assert cli.main(["train-twist", *task, *lexicon, "--out", out, "--config", TRAIN]) == 0
    assert "linear twist by ctl after 6 steps" in capsys.readouterr().out
    card = json.loads((tmp_path / "twist" / "card.json").read_text())
    assert (card["potential"], card["potential_args"]["weight"], card["steps"]) == ("lexicon", -1.5, 6)
    assert (tmp_path / "twist" / "bounds.png").exists()

    monkeypatch.setitem(vars(fastsmc), "LLM", lambda model, **kwargs: HFEngine(model))
    report, picture = tmp_path / "report.json", tmp_path / "report.png"
    arguments = ["evaluate", *task, "--twist", out, "--runs", "4", "--rejection", "5"]
    assert cli.main([*arguments, "--json", str(report), "--plot", str(picture)]) == 0
    assert "KL(q‖σ)" in capsys.readouterr().out and picture.exists()
    result = json.loads(report.read_text())
    assert result["exact_samples"] == 5 and set(result["samplers"]) == {"base", "twisted"}
    assert len(result["samplers"]["twisted"]["bounds"]["upper_runs"]) == 4


def test_train_a_conditional_twist_for_many_prompts(tiny_model, tmp_path, capsys, monkeypatch):
    """From JSON Lines, with held-out prompts on the card; then the twist is told by `run` what must follow."""
    from fastsmc.hf import HFEngine

    train, held_out, out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl", str(tmp_path / "twist")
    train.write_text('{"prompt": "w1 w2", "continuation": "w3"}\n{"prompt": [4, 1, 2], "continuation": [5, 1]}\n')
    held_out.write_text('{"prompt": "w6", "continuation": "w1 w2"}\n')
    task = ["--model", tiny_model, "--max-tokens", "2", "--particles", "16", "--ignore-eos"]
    config = {"continuation_tokens": 2, "rank": 8, "steps": 3, "eval_every": 3, "eval_runs": 2, "prompts_per_step": 2}
    arguments = ["train-twist", *task, "--prompts", str(train), "--held-out", str(held_out), "--out", out]
    assert cli.main([*arguments, "--config", json.dumps(config)]) == 0
    assert "mean of 1 held-out prompts" in capsys.readouterr().out
    card = json.loads((tmp_path / "twist" / "card.json").read_text())
    assert (card["prompts"]["count"], card["held_out"]["count"], card["continuation_tokens"]) == (2, 1, 2)
    assert card["held_out"]["after"]["step"] == 3

    monkeypatch.setitem(vars(fastsmc), "LLM", lambda model, **kwargs: HFEngine(model))
    run = ["run", *task, "--prompt", "w3 w1", "--twist", out]
    assert cli.main([*run, "--potential", "infill", "--potential-args", '{"continuation": "w5"}']) == 0
    assert "log Ẑ" in capsys.readouterr().out
    assert cli.main(run) == 2
    assert "conditional on what must follow" in capsys.readouterr().err
    train.write_text('{"prompt": "w1"}\n{"promt": "w1"}\n')
    assert cli.main([*arguments, "--config", json.dumps(config)]) == 2
    assert "train.jsonl, line 2: holds 'promt'" in capsys.readouterr().err


@pytest.mark.parametrize("text", [["--text", "w3 w1 w6 w2"], ["--token-ids", "[3, 1, 6, 2]"], []])
def test_counterfactual(tiny_model, tmp_path, capsys, monkeypatch, text):
    """On a real, tiny model, over Hugging Face in the place of vLLM: what the call in Python gives, and its diffs."""
    from fastsmc.counterfactuals import Counterfactuals
    from fastsmc.hf import HFEngine
    from fastsmc.interventions import Prompt, Steer, Temperature, save

    calls, engine = [], HFEngine(tiny_model)
    monkeypatch.setitem(vars(fastsmc), "LLM", lambda model, **kwargs: calls.append(kwargs) or engine)
    steer, prompt = Steer(0, torch.ones(64), 0.5), ["--model", tiny_model, "--prompt", "w1 w2"]
    save([steer], tmp_path / "steer")
    files = {name: tmp_path / name for name in ("out.json", "out.npz", "curve.svg")}
    arguments = ["counterfactual", *prompt, *text, "--intervention", str(tmp_path / "steer"), "--temperature-to", "1.3"]
    arguments += ["--prompt-to", "w1 w5", "--n", "30", "--seed", "4", "--top-k", "7", "--json", str(files["out.json"])]
    arguments += ["--best", "3", "--save", str(files["out.npz"]), "--plot-survival", str(files["curve.svg"])]
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(arguments) == 0
    params = SMCParams(n_particles=30, max_tokens=4 if text else 16, seed=4, top_k=7)
    change = [steer, Temperature(1.3), Prompt([1, 5])]
    want = engine.counterfactual("w1 w2", [3, 1, 6, 2] if text else None, change, params=params)
    found, result = Counterfactuals.load(files["out.npz"]), json.loads(files["out.json"].read_text())
    assert found.token_ids == want.token_ids == result["token_ids"] and result["factual_ids"] == want.factual_ids
    assert result["survival"] == want.survival.tolist() and result["common_prefix"] == want.common_prefix.tolist()
    assert result["expected_common_prefix"] == want.expected_common_prefix and files["curve.svg"].exists()
    for diff, there in zip(result["diffs"], want.texts, strict=True):
        gone, come = r"\[-(.*?)-\]", r"\{\+(.*?)\+\}"
        assert re.sub(come, "", re.sub(gone, r"\1", diff)) == result["factual_text"]
        assert re.sub(gone, "", re.sub(come, r"\1", diff)) == there
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert f"{want.expected_common_prefix:.2f} of {len(want.factual_ids)} tokens stay" in out and "[-" in out
    assert lines[2].split() == ["share", "kept", "counterfactual"] and lines[6] == ""
    assert all(len(line) <= 60 for line in lines[:6])
    shares = [float(line.split()[0]) for line in lines[3:6]]
    assert shares == sorted(shares, reverse=True) and f"{len(set(map(tuple, want.token_ids)))} different" in out
    assert calls == [{"interventions": True, **EAGER}]


def test_diffs_begin_shortly_before_their_first_change():
    for diff, shown in (
        ("a" * 12 + "[-b-]c", "a" * 12 + "[-b-]c"),
        ("b" + "a" * 12 + "{+b+}[-c-]", "…" + "a" * 12 + "{+b+}[-c-]"),
    ):
        assert cli._from_change(diff) == shown


def test_counterfactual_makes_room(fake, capsys):
    """A text has a row beside the particles; only interventions on layers need places."""
    fake.get_tokenizer = lambda self: None
    fake.counterfactual = lambda self, *args, **kwargs: (_ for _ in ()).throw(ValueError("seen"))
    for n, room in ((1023, {}), (1024, {"max_num_seqs": 1025})):
        assert (
            cli.main(["counterfactual", "--prompt", "x", "--model", "m", "--temperature-to", "2", "--n", str(n)]) == 2
        )
        assert fake.calls[-2] == ("init", "m", room | EAGER) and "seen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "--intervention: is missing"),
        (["--intervention", "nowhere"], "nowhere"),
        (["--intervention", __file__], "holds no interventions"),
        (["--temperature-to", "0"], "t=0.0: must be"),
        (["--prompt-to", ""], "--prompt-to: is empty"),
        (["--temperature-to", "2", "--text", ""], "--text: is empty"),
        (["--temperature-to", "2", "--text", "a", "--token-ids", "[1]"], "not allowed with"),
        (["--temperature-to", "2", "--token-ids", "[1"], "is not JSON"),
        (["--temperature-to", "2", "--token-ids", "[]"], "--token-ids: is empty"),
        (["--temperature-to", "2", "--token-ids", '["a"]'], "--token-ids"),
        (["--temperature-to", "2", "--n", "0"], "n_particles=0"),
        (["--temperature-to", "2", "--max-tokens", "0"], "max_tokens=0"),
        (["--temperature-to", "2", "--noise", "loud"], "--noise loud"),
        (["--temperature-to", "2", "--plot-survival", "x.docx"], "--plot-survival x.docx: unknown suffix"),
        (["--temperature-to", "2", "--save", "no/such/x"], "no directory"),
    ],
)
def test_counterfactual_refuses(fake, capsys, arguments, why):
    try:
        status = cli.main(["counterfactual", "--prompt", "p", *arguments])
    except SystemExit as error:  # argparse
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and why in error and error.count("\n") == 1 and fake.calls == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["train-twist", "--out", "x"], "--potential: is missing"),
        (["train-twist", "--out", "x", "--potential", "no"], "unknown"),
        (["train-twist", "--out", "x", "--potential", "infill", "--potential-args", '{"continuation": "a"}',
          "--config", '{"loss": "no"}'], "loss='no'"),
        (["train-twist", "--out", "x", "--potential", "infill", "--potential-args", '{"continuation": "a"}',
          "--config", '{"no": 1}'], "--config"),
        (["train-twist", "--out", "x", "--potential", "infill", "--potential-args", '{"continuation": "a"}',
          "--config", '{"continuation_tokens": 1}'], "must not stand beside continuation_tokens"),
        (["train-twist", "--out", "x", "--config", '{"continuation_tokens": 1}', "--held-out", "nowhere"], "nowhere"),
        (["evaluate"], "--potential: is missing"),
        (["evaluate", "--twist", "nowhere"], "card.json"),
        (["run", "--twist", "nowhere"], "card.json"),
        (["evaluate", "--potential", "infill", "--potential-args", '{"continuation": "a"}', "--runs", "1"], "--runs 1"),
        (["evaluate", "--potential", "infill", "--potential-args", '{"continuation": "a"}', "--exact", "nowhere"],
         "nowhere"),
    ],
)  # fmt: skip
def test_twist_commands_refuse(fake, capsys, arguments, why):
    assert cli.main([arguments[0], "--prompt", "p", *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1 and fake.calls == []
