"""`fastsmc align` on a tiny model: what files it writes, that they are the package's own, and what it refuses."""

import contextlib
import json

import pytest
import torch
from tiny import make_llama

import fastsmc
from fastsmc import cli
from fastsmc.alignment import BoundlessDAS, HeatMap, command, heat_map, pairs
from fastsmc.hf import HFEngine

TASK = """
from fastsmc.alignment import CausalModel

MODEL = CausalModel(
    ["a", "b", "c", "left", "both"],
    {"left": lambda a, b: a == b, "both": lambda left, c: left != c},
    prompt=lambda inputs: [1 + inputs["a"], 1 + inputs["b"], 5 + inputs["c"]],
    answers={True: "w4", False: "w3"},
)

def sampler(rng):
    return {name: int(rng.integers(2)) for name in "abc"}

task = MODEL, sampler

def make():
    return task

def fail():
    raise RuntimeError("on its own")

nothing = MODEL
"""
CONFIG = """
model = {model!r}
task = "game.py:task"
variable = "left"
controls = ["c"]
layers = [0, 1]
positions = [-1, 1]
n_pairs = 32
n_held_out = 12
seed = 3
out = "results"

[training]
steps = 3
batch = 16
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = make_llama(tmp_path_factory.mktemp("align") / "model", 8)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w7").save_pretrained(path)
    return str(path)


@pytest.fixture
def config(tmp_path, model):
    """Writes the configuration, changed as asked, and gives its path."""
    (tmp_path / "game.py").write_text(TASK)

    def write(**changes):
        text = CONFIG.format(model=model)
        for old, new in changes.items():
            lines = text.splitlines()
            at = [i for i, line in enumerate(lines) if line.split(" ")[0] == old]
            lines[at[0] if at else 0 : at[0] + 1 if at else 0] = [new]
            text = "\n".join(lines)
        (tmp_path / "align.toml").write_text(text)
        return str(tmp_path / "align.toml")

    return write


def test_align(config, model, tmp_path, capsys, monkeypatch):
    """In both engines, vLLM's being played by Hugging Face's."""
    calls, engine = [], HFEngine(model)
    monkeypatch.setitem(vars(fastsmc), "LLM", lambda *args, **kwargs: calls.append((args, kwargs)) or engine)
    assert cli.main(["align", "--config", config()]) == 0 and not calls
    out = tmp_path / "results"
    found = HeatMap.load(out / "heat_map.json")
    task = command.Task.load(command.Config.read(config()))
    sites = [(layer, position) for layer in (0, 1) for position in (-1, 1)]
    alignments = {(i, p): BoundlessDAS.load(out / "alignments" / f"layer{i}_position{p}") for i, p in sites}
    assert {(a.card.layer, a.card.position, a.card.steps, a.card.variable) for a in alignments.values()} == {
        (*site, 3, ("left",)) for site in sites
    }
    assert [alignments[site].card.iia for site in sites] == found.iia.ravel().tolist()  # the trainer's own
    held_out = pairs(task.model, task.sampler, "left", 12, 4)
    again = heat_map(engine, held_out, [0, 1], [-1, 1], alignments=alignments, controls=task.controls)
    assert found.to_dict() == again.to_dict() and set(found.controls) == {"c"} and found.n_pairs == 12
    assert (out / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert all(f"{share:.3f}" in text for share in found.iia.ravel()) and "12 pairs" in text and len(text) < 800

    other = config(engine='engine = "vllm"', task='task = "game.py:make"', out='out = "others"')
    with open(other, "a") as file:
        file.write("\n[engine_args]\nmax_model_len = 64\n")
    assert cli.main(["align", "--config", other]) == 0
    eager = {} if torch.cuda.is_available() else {"enforce_eager": True}
    assert calls == [((model,), {"interventions": True, "max_model_len": 64, **eager})]
    assert json.loads((tmp_path / "others" / "heat_map.json").read_text()) == json.loads(
        (out / "heat_map.json").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layers": ""}, "layers: is missing"),
        ({"layers": "layers = []"}, "layers=[]: must be a list"),
        ({"layers": "layers = [-1]"}, "layers=-1: must be an integer"),
        ({"positions": "positions = [0.5]"}, "positions=[0.5]: must be integers"),
        ({"depth": "depth = 3"}, "depth: is no key; known are model, task"),
        ({"steps": "stride = 3"}, "training.stride: is no key; known are"),
        ({"steps": "seed = 3"}, "training.seed: is no key"),
        ({"engine": 'engine = "jax"'}, "engine='jax': must be one of 'hf', 'vllm'"),
        ({"engine_args": "engine_args = {a = 1}"}, 'engine_args: is for engine = "vllm"'),
        ({"engine_args": "engine_args = 1"}, "engine_args=1: must be a table"),
        ({"model": "model = 3"}, "model=3: must be a text"),
        ({"n_pairs": "n_pairs = 1"}, "n_pairs=1: must be an integer of at least 2"),
        ({"controls": "controls = [1]"}, "controls=[1]: must be names"),
        ({"controls": 'controls = ["d"]'}, "variable='d': must be one of"),
        ({"variable": 'variable = "right"'}, "variable='right': must be one of"),
        ({"task": 'task = "game.py"'}, "task='game.py': must be file.py:attribute"),
        ({"task": 'task = "none.py:task"'}, "cannot be loaded: FileNotFoundError"),
        ({"task": 'task = "no_such_module:task"'}, "cannot be loaded: ModuleNotFoundError"),
        ({"task": 'task = "game.py:absent"'}, "cannot be loaded: AttributeError"),
        ({"task": 'task = "game.py:fail"'}, "cannot be loaded: RuntimeError: on its own"),
        ({"task": 'task = "game.py:nothing"'}, "must be a CausalModel and a sampler"),
        ({"seed": "seed = "}, "align.toml: "),
    ],
)
def test_refuses(config, capsys, tmp_path, changes, why):
    assert cli.main(["align", "--config", config(**changes)]) == 2
    out, err = capsys.readouterr()
    assert why in err and err.count("\n") == 1 and err.startswith("fastsmc align: error: ") and not out
    assert not (tmp_path / "results").exists()


def test_refuses_what_is_no_file(capsys):
    assert cli.main(["align", "--config", "nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err
    with pytest.raises(SystemExit), contextlib.redirect_stderr(None):
        cli.main(["align"])
