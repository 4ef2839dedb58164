"""`HFReward`: networks of transformers, read alone and in batches."""

import gc
import re
from pathlib import Path

import pytest
import torch
from rewarding import LETTERS, SYMBOLS, TEXTS, letters_tokenizer, make_reward, start
from safetensors.torch import load_file, save_file
from tiny import make_llama

from fastsmc import SMCParams, reward_networks
from fastsmc.potentials import (
    HFReward,
)
from fastsmc.reward_networks import Network, load_networks
from fastsmc.smc import GroupEngine


def read_alone(path, auto, text, **config):
    """The logits of one text, by transformers without padding."""
    import transformers

    model = getattr(transformers, auto).from_pretrained(path, **config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].double()


def loaded(path, tokenizer=None, name="prm"):
    engine = GroupEngine(tokenizer=tokenizer or letters_tokenizer(eos_token="<eos>"), vocab_size=len(LETTERS))
    engine.reward_models = load_networks({name: str(path)}, torch.float32, "cpu")
    return engine


@pytest.mark.parametrize(
    ("kind", "config", "label"),
    [
        ("LlamaForSequenceClassification", {}, None),
        ("LlamaForSequenceClassification", {"labels": 1}, None),
        ("LlamaForSequenceClassification", {"labels": 3, "pad_token_id": 0}, 2),
        ("LlamaForSequenceClassification", {"labels": 3, "problem_type": "multi_label_classification"}, 0),
        ("BertForSequenceClassification", {"pad_token_id": 0}, 0),
    ],
)
def test_a_sequence_classifier_in_a_batch_says_what_it_says_alone(tmp_path, kind, config, label):
    path = make_reward(tmp_path / "rm", kind, **config)
    reward = start(HFReward("prm", label=label, template="Q:{prompt}?{text}"), loaded(path), 4)
    scores = reward.score(TEXTS)
    assert max(scores) - min(scores) > 0.01
    for text, score in zip(TEXTS, scores, strict=True):
        logits = read_alone(path, "AutoModelForSequenceClassification", f"Q:ab?{text}")
        if config.get("labels") == 1 or "problem_type" in config:
            expected = logits.sigmoid()[label or 0]
        else:
            expected = logits.softmax(-1)[1 if label is None else label]
        assert score == pytest.approx(expected.item(), rel=1e-5)
    assert reward._network.config.pad_token_id == config.get("pad_token_id")


def test_a_token_classifier_is_read_at_the_last_step_token(tmp_path):
    path = make_reward(tmp_path / "prm", "LlamaForTokenClassification")
    reward = start(HFReward("prm", step=".", step_token="<step>", template="Q:{text}?"), loaded(path), 4)
    for text, score in zip(TEXTS, reward.score(TEXTS), strict=True):
        read = "Q:" + text.replace(".", "<step>")
        logits = read_alone(path, "AutoModelForTokenClassification", read + "?")[-2]
        assert score == pytest.approx(logits.softmax(-1)[1].item(), rel=1e-5)


def test_a_language_model_is_asked_for_good_or_bad_behind_the_step_token(tmp_path):
    path = make_reward(tmp_path / "prm", "LlamaForCausalLM")
    args = dict(good="+", bad="-", step=".", step_token="<step>", step_join=".<step>")
    reward = start(HFReward("prm", **args), loaded(path), 4)
    for text, score in zip(TEXTS, reward.score(TEXTS), strict=True):
        read = "ab" + text[:-1].replace(".", ".<step>") + "<step>"
        pair = read_alone(path, "AutoModelForCausalLM", read)[-1][[SYMBOLS.index("+"), SYMBOLS.index("-")]]
        assert score == pytest.approx(pair.softmax(-1)[0].item(), rel=1e-5)


def test_batches_are_cut_and_put_together_in_order(tmp_path, monkeypatch):
    path = make_reward(tmp_path / "prm", "LlamaForCausalLM")
    args = dict(good="+", bad="-", step_token="<step>", template="{text}")
    reward = start(HFReward("prm", **args), loaded(path), 4)
    texts = [letter * n + other for n in (9, 1, 5) for letter in "abc" for other in "def"]
    whole, sizes = reward.score(texts), []
    forward = reward._network.model.forward

    def count(*given, input_ids, **rest):
        sizes.append(tuple(input_ids.shape))
        return forward(*given, input_ids=input_ids, **rest)

    monkeypatch.setattr(reward._network.model, "forward", count)
    monkeypatch.setattr(reward_networks, "MOST_TOKENS", 40)
    assert reward.score(texts) == pytest.approx(whole, rel=1e-5)
    assert len(sizes) > 5 and max(rows * length for rows, length in sizes) <= 40
    monkeypatch.setattr(reward_networks, "MOST_LOGITS", 3 * len(SYMBOLS))
    sizes.clear()
    assert reward.score(texts) == pytest.approx(whole, rel=1e-5)
    assert max(rows for rows, _ in sizes) == 3


def test_a_row_that_ends_with_any_token_is_read_to_its_end(tmp_path):
    path = make_reward(tmp_path / "rm", "LlamaForSequenceClassification")
    network = Network.load(path, torch.float32, "cpu")  # no pad token: one is chosen that is no row's last
    rows = [[v] * (v + 1) for v in range(len(SYMBOLS))]
    together = network.probabilities(rows)
    for row, said in zip(rows, together, strict=True):
        torch.testing.assert_close(network.probabilities([row])[0], said, rtol=1e-5, atol=1e-7)
    assert len(set(together[:, 1].tolist())) == len(rows)


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        (
            "LlamaForSequenceClassification",
            {"model": "orm"},
            "model='orm': is not loaded (there are: 'prm'); an engine",
        ),
        (
            "LlamaForSequenceClassification",
            {"good": "+", "bad": "-"},
            "good='+': LlamaForSequenceClassification has no good and bad",
        ),
        ("LlamaForSequenceClassification", {"label": 2}, "label=2: must be below 2"),
        ("LlamaForCausalLM", {"step_token": "<step>"}, "good=None: LlamaForCausalLM needs good and bad"),
        ("LlamaForCausalLM", {"good": "+", "bad": "-"}, "step_token=None: LlamaForCausalLM is read at a step token"),
        ("LlamaForCausalLM", {"good": "ab", "bad": "-", "step_token": "<step>"}, "good='ab': must be one token"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused_in_setup(tmp_path, kind, args, said):
    engine = loaded(make_reward(tmp_path / "prm", kind))
    with pytest.raises(ValueError, match=re.escape(said)):
        HFReward(**{"model": "prm", **args}).setup(engine)


def test_labels_must_be_named_where_there_are_several(tmp_path):
    engine = loaded(make_reward(tmp_path / "rm", "LlamaForSequenceClassification", labels=3))
    with pytest.raises(ValueError, match="label=None: must name one of the 3 labels"):
        HFReward("prm").setup(engine)


def test_a_text_that_is_too_long_is_refused(tmp_path):
    reward = start(HFReward("prm"), loaded(make_reward(tmp_path / "rm", "LlamaForSequenceClassification")), 2)
    with pytest.raises(ValueError, match="has 72 tokens: must be from 1 to 64"):
        reward.score(["a" * 70])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model": ""}, "model='': must be text"),
        ({"good": "+"}, "good='+', bad=None: must be two texts"),
        ({"template": "{prompt}"}, "template='{prompt}': must be text with {text} in it"),
        ({"step": "."}, "step='.', step_join=None: only with a step_token"),
        ({"step_token": ""}, "step_token='': must be text, or None"),
        ({"label": -1}, "label=-1: must be an integer of at least 0"),
        ({"aggregate": "mean"}, "aggregate='mean': must be one of"),
    ],
)
def test_arguments_of_hf_rewards_are_checked(args, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        HFReward(**{"model": "prm", **args})


def test_networks_that_cannot_be_loaded_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^reward_models\['prm'\]='.*nowhere': "):
        load_networks({"prm": str(tmp_path / "nowhere")}, torch.float32, "cpu")
    make_reward(tmp_path / "odd", "LlamaModel")
    with pytest.raises(ValueError, match="architecture LlamaModel: must end with ForSequenceClassification"):
        load_networks({"odd": str(tmp_path / "odd")}, torch.float32, "cpu")
    path = make_reward(tmp_path / "half", "LlamaForSequenceClassification")
    weights = load_file(path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights score.weight"):
        load_networks({"half": str(path)}, torch.float32, "cpu")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what files are mapped")
def test_weights_are_in_memory_and_not_in_a_file_that_is_mapped(tmp_path):
    """An engine measures what is free behind them."""
    from transformers import LlamaForSequenceClassification

    path = make_reward(tmp_path / "rm", "LlamaForSequenceClassification")
    mapped = LlamaForSequenceClassification.from_pretrained(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    del mapped
    gc.collect()
    network = Network.load(path, torch.float32, "cpu")
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text() and network.weight_bytes


def test_bytes_of_a_network(tmp_path):
    network = Network.load(make_reward(tmp_path / "rm", "LlamaForSequenceClassification"), torch.float32, "cpu")
    saved = load_file(tmp_path / "rm" / "model.safetensors")
    buffers = sum(b.numel() * b.element_size() for b in network.model.buffers())
    assert network.weight_bytes == sum(4 * w.numel() for w in saved.values()) + buffers


def test_hf_engines_load_reward_models(tmp_path):
    from fastsmc.hf import HFEngine

    path = make_llama(tmp_path / "policy", len(LETTERS))
    rm = make_reward(tmp_path / "rm", "LlamaForSequenceClassification")
    engine = HFEngine(path, letters_tokenizer(eos_token="<eos>"), reward_models={"rm": str(rm)})
    params = SMCParams(n_particles=6, max_tokens=6, proposal="base", ess_threshold=0.0)
    population = engine.smc("ab", params, HFReward("rm", template="Q{text}", label=0))
    for ids, weight in zip(population.token_ids, population.log_weights, strict=True):
        text = "".join(LETTERS[v] for v in ids if v)
        alone = read_alone(rm, "AutoModelForSequenceClassification", "Q" + text).softmax(-1)[0].log().item()
        assert weight == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ValueError, match=r"reward_models\['no'\]='.*': "):
        HFEngine(path, reward_models={"no": str(tmp_path / "no")})
