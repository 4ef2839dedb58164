"""Reward models as potentials, and answers that come later."""

import concurrent.futures
import gc
import math
import re
import threading
import zlib
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from rewarding import LETTERS, SYMBOLS, letters_tokenizer, make_reward, pooling_server
from safetensors.torch import load_file, save_file
from tiny import PROMPT, TinyLlama, make_llama, run_tables, step_tables

from fastsmc import SMCParams, reward_networks
from fastsmc.potentials import (
    GROUP,
    Final,
    HFReward,
    Lexicon,
    PoolingReward,
    Potential,
    Product,
    RewardModel,
    State,
    pooling_reward,
    registered,
    resolve,
)
from fastsmc.potentials.copying import own_copy
from fastsmc.potentials.waiting import in_background, join
from fastsmc.reward_networks import Network, load_networks
from fastsmc.smc import Group, GroupEngine, SMCError, set_up
from fastsmc.testing import check_potential

ALL = torch.tensor([True, True])


def ends(*finished: bool) -> State:
    state = State()
    state.finished = torch.tensor(finished)
    return state


class Later(Potential):
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.future: Future = Future()

    def fetch(self, state, about):
        self.about = about.tolist()
        return self.future

    def complete(self, state):
        return torch.zeros(len(state.finished))


# -- fetch -------------------------------------------------------------------------------------------------------------
def test_without_parts_that_take_a_while_there_is_nothing_to_wait_for():
    class Quick(Potential):
        def complete(self, state):
            return torch.zeros(len(state.finished))

    assert Quick().fetch(ends(True, True), ALL) is None
    assert Product(Quick(), Final(Quick())).fetch(ends(True, True), ALL) is None


def test_a_product_waits_for_all_its_factors():
    a, b = Later(), Later()
    joined = (a * Final(b)).fetch(ends(False, True), ALL)
    assert (a.about, b.about) == ([True, True], [False, True])
    b.future.set_result(None)
    assert not joined.done()
    a.future.set_result(None)
    assert joined.result(timeout=0) is None


def test_final_does_not_ask_about_the_unfinished():
    later = Later()
    assert Final(later).fetch(ends(False, False), ALL) is None
    assert not hasattr(later, "about")


def test_a_joined_future_holds_the_first_exception_once_all_are_done():
    parts = [Future(), Future(), Future()]
    joined = join([None, *parts])
    parts[2].set_exception(ValueError("third"))
    parts[1].set_exception(ValueError("second"))
    assert not joined.done()
    parts[0].set_result(None)
    with pytest.raises(ValueError, match="second"):
        joined.result(timeout=0)


def test_cancelling_a_joined_future_cancels_all():
    parts = [Future(), Future()]
    joined = join(parts)
    assert joined.cancel()
    assert all(part.cancelled() for part in parts)
    assert concurrent.futures.wait([joined], timeout=0).done == {joined}  # who waits for several is told, too
    with pytest.raises(CancelledError):
        joined.result(timeout=0)


def test_a_joined_future_is_cancelled_where_a_part_is():
    parts = [Future(), Future()]
    joined = join(parts)
    parts[0].cancel()
    assert not joined.done()
    parts[1].set_result(None)
    assert joined.cancelled()


def test_parts_that_end_at_the_same_time_end_it_once():
    for _ in range(50):
        parts, barrier = [Future() for _ in range(4)], threading.Barrier(4)
        joined = join(parts)

        def settle(part, barrier=barrier):
            barrier.wait()
            part.set_result(None)

        threads = [threading.Thread(target=settle, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert joined.result(timeout=1) is None


def test_what_runs_in_the_background_sees_that_it_is_cancelled():
    begun, seen = threading.Event(), Future()
    may_look = threading.Event()

    def work(future):
        begun.set()
        may_look.wait(10)
        seen.set_result(future.cancelled())

    running = in_background(work)
    assert begun.wait(10)
    assert running.cancel()
    may_look.set()
    assert seen.result(timeout=10) is True
    failed = in_background(lambda future: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(timeout=10)
    assert concurrent.futures.wait([running], timeout=10).not_done == set()


# -- RewardModel -------------------------------------------------------------------------------------------------------
EOS, DOT = 0, 7


@pytest.fixture(scope="module")
def engine():
    return GroupEngine(tokenizer=letters_tokenizer(eos_token="<eos>"), vocab_size=len(LETTERS))


class Vowels(RewardModel):
    """Scores a text with a number of its own, and writes down what it was asked."""

    def __init__(self, **args):
        super().__init__(**args)
        self.asked = []

    def score(self, texts):
        self.asked.append(list(texts))
        return [score_of(text) for text in texts]


def score_of(text) -> float:
    """A number in (0, 1) that hangs on the whole text (or its token ids)."""
    text = text if isinstance(text, str) else "".join(LETTERS[v] for v in text)
    return 0.05 + 0.9 * (zlib.crc32(text.encode()) % 1000) / 1000


def segment_state(rows, finished, segmented=True) -> State:
    """The state of a group: rows of letters, "-" where a particle waited or had ended, "$" the stop token."""
    state, t = State(), max(map(len, rows))
    ids = [[LETTERS.index(c) if c in LETTERS else {"-": -1, "$": EOS}[c] for c in row.ljust(t, "-")] for row in rows]
    state.tokens = torch.tensor(ids)
    state.lengths = (state.tokens >= 0).sum(1)
    state.finished, state.step = torch.tensor(finished), t
    state.segments = torch.zeros(len(rows), dtype=torch.int64) if segmented else None
    state.prompt, state.max_tokens, state.stop_token_ids = [1, 2], 99, frozenset({EOS})
    return state


def start(potential, engine, n=2):
    potential.prepare(engine.tokenizer)
    copy = own_copy(set_up(potential, engine), engine)
    copy.reset(n, [1, 2])
    return copy


def logit(score: float) -> float:
    return math.log(score / (1 - score))


@pytest.mark.parametrize("scale", ["log", "logit"])
@pytest.mark.parametrize("aggregate", ["last", "product", "min"])
def test_log_psi_after_segments_is_what_the_aggregate_says(engine, aggregate, scale):
    f = math.log if scale == "log" else logit
    join_scores = {"last": lambda each: each[-1], "product": sum, "min": min}[aggregate]
    reward = start(Vowels(aggregate=aggregate, scale=scale), engine, 3)

    def expected(*texts):
        return join_scores([f(score_of(text)) for text in texts])

    nothing = segment_state(["", "", ""], [False] * 3)
    assert reward.prefix(nothing).tolist() == [0, 0, 0]
    first = reward.prefix(segment_state(["ab.", "c.-", "ddd"], [False] * 3))
    assert first.tolist() == pytest.approx([expected("ab."), expected("c."), expected("ddd")], abs=1e-12)
    reward.reindex(torch.tensor([2, 0, 0]))
    state = segment_state(["dddef.", "ab.c$-", "ab.ef."], [False, True, False])
    psi, phi = reward.prefix(state), reward.complete(state)
    assert psi[[0, 2]].tolist() == pytest.approx([expected("ddd", "dddef."), expected("ab.", "ab.ef.")], abs=1e-12)
    assert phi[1].item() == pytest.approx(expected("ab.", "ab.c"), abs=1e-12)  # the rest is a segment, without "$"
    reward.reindex(torch.tensor([1, 1, 0]))
    state = segment_state(["ab.c$-", "ab.c$-", "dddef.a"], [True, True, True])
    ended = reward.complete(state)
    assert ended[:2].tolist() == phi[[1, 1]].tolist()  # what has ended keeps its number
    assert ended[2].item() == pytest.approx(expected("ddd", "dddef.", "dddef.a"), abs=1e-12)


def test_each_text_is_scored_once_per_boundary(engine):
    reward = start(Vowels(), engine, 4)
    reward.prefix(segment_state(["a.-", "a.-", "bc.", "a.-"], [False] * 4))
    state = segment_state(["a.--b$", "a.--c.", "bc.---", "a.--c."], [False, False, False, False])
    state.finished[0] = True
    reward.prefix(state)
    reward.complete(state)
    reward.complete(state)
    assert reward.asked == [["a.", "bc."], ["a.c."], ["a.b"]]  # the third has drawn nothing since, so is not asked


def test_without_segments_only_whole_texts_are_scored(engine):
    reward = start(Vowels(aggregate="product", scale="logit"), engine)
    state = segment_state(["ab.", "c$"], [False, True], segmented=False)
    assert reward.prefix(state).tolist() == [0, 0]
    assert reward.complete(state)[1].item() == pytest.approx(logit(score_of("c")), abs=1e-12)
    state = segment_state(["ab.d", "c$"], [True, True], segmented=False)
    assert reward.complete(state).tolist() == pytest.approx([logit(score_of(text)) for text in ("ab.d", "c")])
    assert reward.asked == [["c"], ["ab.d"]]


def test_it_keeps_the_contract(engine):
    check_potential(Vowels(), engine, max_tokens=4, stop_token_ids=[EOS], n_sequences=12)


def test_token_ids(engine):
    reward = start(Vowels(on="tokens"), GroupEngine(vocab_size=8))
    state = segment_state(["ab.", "ab$"], [False, True])
    assert reward.prefix(state)[0].item() == pytest.approx(math.log(score_of("ab.")))
    assert reward.complete(state)[1].item() == pytest.approx(math.log(score_of("ab")))
    assert reward.asked == [[[1, 2, 7]], [[1, 2]]] and reward.prompt == [1, 2]


def test_groups_do_not_share_what_they_know(engine):
    origin = set_up(Vowels(aggregate="product"), engine)
    one, other = own_copy(origin, engine), own_copy(origin, engine)
    for copy in (one, other):
        copy.reset(2, [1, 2])
    before = one.prefix(segment_state(["a.", "b."], [False, False]))
    other.prefix(segment_state(["c.", "d."], [False, False]))
    assert one.prefix(segment_state(["a.", "b."], [False, False])).tolist() == before.tolist()
    assert one.asked == [["a.", "b."]]


def test_scores_of_zero_and_one(engine):
    class Sure(RewardModel):
        def score(self, texts):
            return torch.tensor([0.0, 1.0])

    state = segment_state(["a.", "b."], [False, False])
    assert start(Sure(), engine).prefix(state).tolist() == [-math.inf, 0]
    bound = math.log(1e-7) - math.log1p(-1e-7)
    assert start(Sure(scale="logit"), engine).prefix(state).tolist() == pytest.approx([bound, -bound], rel=1e-6)


@pytest.mark.parametrize(
    ("answer", "scale", "said"),
    [
        ([math.nan, 1], "log", "Says.score gave nan for 'a.': must be finite numbers of at least 0, scale='log'"),
        ([1, math.inf], "log", "Says.score gave inf for 'b.': must be"),
        ([1, -0.1], "log", "Says.score gave -0.1 for 'b.': must be"),
        ([1, 1.5], "logit", "Says.score gave 1.5 for 'b.': must be numbers in [0, 1], scale='logit'"),
        ([1], "log", "Says.score gave 1 values for 2 text: must be one for each"),
        (0.5, "log", "Says.score gave 0.5, a float: must be a sequence of"),
        (["x", 1], "log", "Says.score gave 'x', a str: must be"),
        ([True, 1], "log", "Says.score gave True, a bool: must be"),
        (None, "log", "Says.score gave None, a NoneType: must be"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_wrong_scores_say_class_value_and_what_is_allowed(engine, answer, scale, said, later):
    class Says(RewardModel):
        in_background = later

        def score(self, texts):
            return answer

    reward, state = start(Says(scale=scale), engine), segment_state(["a.", "b."], [False, False])
    with pytest.raises(ValueError, match=re.escape(said)):
        if later:
            reward.fetch(state, ALL).result(timeout=10)
        else:
            reward.prefix(state)


def test_arguments_are_checked(engine):
    for args in ({"aggregate": "mean"}, {"scale": "linear"}, {"on": "bytes"}):
        [(name, value)] = args.items()
        with pytest.raises(ValueError, match=f"^{name}='{value}': must be one of"):
            Vowels(**args)
    with pytest.raises(ValueError, match="Empty: must define score"):
        type("Empty", (RewardModel,), {})().setup(engine)
    with pytest.raises(ValueError, match="Vowels: this engine has no tokenizer"):
        Vowels().setup(GroupEngine(vocab_size=8))


def test_scores_that_take_a_while_are_found_in_the_background(engine):
    threads = []

    class Slow(Vowels):
        in_background = True

        def score(self, texts):
            threads.append(threading.current_thread())
            assert not torch.is_grad_enabled()
            return super().score(texts)

    reward = start(Slow(aggregate="product"), engine, 3)
    state = segment_state(["a.", "b.", "c$"], [False, False, True])
    future = reward.fetch(state, torch.tensor([True, True, True]))
    future.result(timeout=10)
    assert reward.fetch(state, torch.tensor([True, True, True])) is None  # all is known
    psi, phi = reward.prefix(state), reward.complete(state)
    assert [psi[0].item(), psi[1].item(), phi[2].item()] == pytest.approx(
        [math.log(score_of(t)) for t in ("a.", "b.", "c")]
    )
    assert len(threads) == 1 and threads[0] is not threading.current_thread()
    assert reward.asked == [["a.", "b.", "c"]]
    later = segment_state(["a.--a.", "b.--c.", "c$----"], [False, False, True])
    reward.prefix(later)  # nobody fetched: in the foreground
    assert threads[1] is threading.current_thread()
    assert reward.fetch(segment_state(["", "", ""], [False] * 3), torch.ones(3, dtype=torch.bool)) is None


def test_without_segments_nothing_is_fetched_of_the_unfinished(engine):
    class Slow(Vowels):
        in_background = True

    reward = start(Slow(), engine)
    assert reward.fetch(segment_state(["a.", "b."], [False, False], segmented=False), ALL) is None
    reward.fetch(segment_state(["a.c", "b$"], [False, True], segmented=False), ALL).result(timeout=10)
    assert reward.asked == [["b"]]


def test_what_a_subclass_shares_travels(engine):
    class Listed(Vowels):
        shared_by_groups = ("words",)

        def __init__(self):
            super().__init__()
            self.words = ["a", "b"]

    reward = Listed()
    reward.setup(engine)
    assert cloudpickle.loads(cloudpickle.dumps(reward)).words == ["a", "b"]


# -- HFReward ----------------------------------------------------------------------------------------------------------
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


TEXTS = ["ab.", "c.", "ddefff.", "a.b.c.d.e.f."]


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


# -- PoolingReward -----------------------------------------------------------------------------------------------------
@pytest.fixture
def server():
    with pooling_server(lambda text: [1 - score_of(text), score_of(text)]) as server:
        yield server


def pooled(server, engine, route="/classify", **args):
    return start(PoolingReward(server.url + route, **{"template": "{text}", "timeout": 10, **args}), engine)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pooling_reward, "PAUSES", (0.01, 0.02))


@pytest.mark.parametrize("route", ["/classify", "/pooling"])
def test_a_server_is_asked_in_batches(server, engine, route):
    reward = pooled(server, engine, route, batch_size=3, model="rm", template="{prompt}:{text}")
    assert reward.score(TEXTS) == [score_of(f"ab:{text}") for text in TEXTS]
    assert [body["input"] for body in server.asked] == [[f"ab:{t}" for t in TEXTS[:3]], [f"ab:{TEXTS[3]}"]]
    assert all(body["model"] == "rm" for body in server.asked)
    assert not any("Authorization" in headers for headers in server.headers)


def test_a_single_label_is_the_score(engine):
    with pooling_server(lambda text: [score_of(text)]) as server:
        assert pooled(server, engine).score(TEXTS) == [score_of(text) for text in TEXTS]


def test_a_server_weighs_particles(server, engine):
    reward = pooled(server, engine, aggregate="product")
    state = segment_state(["a.", "b$"], [False, True])
    future = reward.fetch(state, ALL)
    future.result(timeout=10)
    psi, phi = reward.prefix(state), reward.complete(state)
    assert [psi[0].item(), phi[1].item()] == pytest.approx([math.log(score_of(text)) for text in ("a.", "b")])
    assert len(server.asked) == 1


def test_what_may_pass_is_tried_again(server, engine, quick):
    server.plan += [500, "drop", 429]
    assert pooled(server, engine).score(["a."]) == [score_of("a.")]
    assert len(server.asked) == 4


def test_what_does_not_pass_ends_with_url_and_seconds(server, engine, quick):
    server.plan += [503] * 3
    said = rf"^PoolingReward: {server.url}/classify answered HTTP 503: .*\(3 of 3 attempts, \d+\.\d\d s\)$"
    with pytest.raises(RuntimeError, match=said):
        pooled(server, engine, retries=2).score(["a."])
    assert len(server.asked) == 3


def test_a_refusal_is_not_tried_again(server, engine):
    server.plan += [404]
    with pytest.raises(RuntimeError, match=r"/classify answered HTTP 404: .*\(1 of 4 attempts"):
        pooled(server, engine).score(["a."])
    assert len(server.asked) == 1


def test_a_dead_server_is_named(engine, quick):
    with pooling_server(lambda text: [0.5]) as server:
        pass
    with pytest.raises(RuntimeError, match=rf"{server.url}/classify cannot be reached: .*\(2 of 2 attempts, \d"):
        pooled(server, engine, retries=1).score(["a."])


def test_a_time_out_says_how_long(server, engine):
    server.hold.clear()
    reward, state = pooled(server, engine, timeout=0.2), segment_state(["a.", "b."], [False, False])
    said = rf"{server.url}/classify gave no answer within timeout=0.2 s \(1 of 4 attempts, 0\.\d+ s\)"
    with pytest.raises(RuntimeError, match=said):
        reward.fetch(state, ALL).result(timeout=20)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda answer: "<html>", r"answered '<html>': JSONDecodeError"),
        (lambda answer: {"data": answer["data"][1:]}, "answered about 1 texts, was asked about 2"),
        (lambda answer: {"data": answer["data"] + answer["data"]}, "answered about 4 texts, was asked about 2"),
        (lambda answer: {"error": "busy"}, r"""answered '{"error": "busy"}': KeyError: 'data'"""),
        (lambda answer: {"data": [{"index": i, "probs": []} for i in (0, 1)]}, "answered .*label=1: must be below 0"),
        (
            lambda answer: {"data": [{"index": i, "probs": [0, math.nan]} for i in (0, 1)]},
            "^PoolingReward: http://.*/classify gave nan for 'a.'",
        ),
        (
            lambda answer: {"data": [{"index": i, "probs": [0, "1"]} for i in (0, 1)]},
            "^PoolingReward: http://.*/classify gave '1', a str: must be",
        ),
        (
            lambda answer: {"data": [{"index": i, "probs": [0, -1.5]} for i in (0, 1)]},
            "^PoolingReward: http://.*/classify gave -1.5 for 'a.'",
        ),
    ],
)
def test_answers_that_are_none_are_refused(server, engine, change, said):
    server.plan.append(change)
    reward, state = pooled(server, engine, label=1), segment_state(["a.", "b."], [False, False])
    with pytest.raises(ValueError, match=said):
        reward.fetch(state, ALL).result(timeout=10)


def test_a_server_that_reads_at_another_token_is_told_so(server, engine):
    server.plan.append(lambda answer: {"data": [{"index": 0, "data": []}]})
    with pytest.raises(
        ValueError, match="/pooling answered .*: no row for a text: is step_token='!' the server's step"
    ):
        pooled(server, engine, "/pooling", step_token="!").score(["a."])


def test_an_aborted_group_asks_no_more(server, engine, quick):
    reward = pooled(server, engine, batch_size=1, retries=50)
    server.hold.clear()
    future = reward.fetch(segment_state(["a.", "b."], [False, False]), ALL)
    assert server.began.wait(10)
    [thread] = [t for t in threading.enumerate() if t.name == "fastsmc-background"]
    assert future.cancel()
    server.plan += [500]
    server.hold.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(server.asked) == 1 and reward._known == {}


def test_the_key_comes_from_the_operators_environment(server, engine, monkeypatch):
    with pytest.raises(SMCError, match="api_key_env='FASTSMC_TEST_KEY': is not set in this process"):
        pooled(server, engine, api_key_env="FASTSMC_TEST_KEY")
    monkeypatch.setenv("FASTSMC_TEST_KEY", "secret")
    reward = pooled(server, engine, api_key_env="FASTSMC_TEST_KEY")
    reward.score(["a."])
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert b"secret" not in cloudpickle.dumps(reward)


def test_a_proxy_of_the_environment_does_not_stand_before_localhost(server, engine, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert pooled(server, engine, retries=0).score(["a."]) == [score_of("a.")]


def test_it_travels_after_it_was_used(server, engine):
    origin = PoolingReward(server.url + "/classify", template="{text}")
    first = start(origin, engine)
    first.score(["a."])
    sent = cloudpickle.loads(cloudpickle.dumps(origin))
    assert start(sent, engine).score(["b."]) == [score_of("b.")]
    assert start(origin, engine)._client is own_copy(origin, engine)._client  # groups share connections


def known(code):
    return {"prm": EntryPoint("prm", code, GROUP)}


def test_requests_cannot_make_one():
    assert not any("eward" in entry.value for entry in registered().values())
    url = "http://localhost/classify"
    for args in ({}, {"url": url}):
        with pytest.raises(ValueError, match="the arguments of PoolingReward are the operator's; name a function"):
            resolve("prm", args, known("fastsmc.potentials:PoolingReward"))
    made = resolve("prm", {}, known("rewarding:operators_reward"))
    assert isinstance(made, PoolingReward) and made.url == "http://127.0.0.1:9/classify"
    with pytest.raises(ValueError, match="unexpected keyword argument"):
        resolve("prm", {"url": url}, known("rewarding:operators_reward"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"url": "ftp://x/classify"}, "url='ftp://x/classify': must be http"),
        ({"url": "http://x/v1/completions"}, "url='http://x/v1/completions': must be http"),
        ({"url": "http://x:99999/classify"}, "url='http://x:99999/classify': must be http"),
        ({"url": "http:///classify"}, "url='http:///classify': must be"),
        ({"url": "http://x/classify?key=1"}, "url='http://x/classify?key=1': must be http"),
        ({"url": "http://user:hidden@x/classify"}, "url: must be http(s)://host"),
        ({"url": None}, "url=None: must be"),
        ({"timeout": 0}, "timeout=0: must be a number in"),
        ({"timeout": math.inf}, "timeout=inf: must be a number in"),
        ({"retries": -1}, "retries=-1: must be an integer from 0 to 100"),
        ({"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ({"api_key_env": ""}, "api_key_env='': must be text"),
    ],
)
def test_arguments_of_pooling_rewards_are_checked(args, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        PoolingReward(**{"url": "http://localhost:8000/classify", **args})
    assert "hidden" not in str(refusal.value)


# -- groups ------------------------------------------------------------------------------------------------------------
WORDS, STEPS, STOP = ["a", "b", ".", "c", "d", "<eos>"], 4, 5


class Hashed(RewardModel):
    """Scores in (0.3, 0.75), which hang on the whole text."""

    def score(self, texts):
        return [0.25 + score_of(text) / 2 for text in texts]


class HashedLater(Hashed):
    in_background = True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), len(WORDS)), len(WORDS), STEPS, frozenset([STOP]))


def log_phi(reward, ids, params):
    """log φ of a whole sequence, from its definition."""
    f, ends, begin = (math.log if reward.scale == "log" else logit), [], 0
    for t in range(1, len(ids) + 1):
        new = "".join(WORDS[v] for v in ids[begin:t])
        if (params.segment or ("\0",))[0] in new or t - begin == params.max_segment_tokens or t == len(ids):
            ends.append(t)
            begin = t
    if not params.segmented:
        ends = [len(ids)]
    texts = ["".join(WORDS[v] for v in ids[:end] if v != STOP) for end in ends]
    values = [f(score) for score in reward.score(texts)]
    return {"last": values[-1], "product": sum(values), "min": min(values)}[reward.aggregate]


SEGMENTED, CAPPED = dict(segment="."), dict(segment="ab", max_segment_tokens=2)


@pytest.mark.parametrize(
    ("kind", "aggregate", "scale", "scheme", "threshold", "way"),
    [
        (Hashed, "last", "log", "systematic", 0.5, SEGMENTED),
        (Hashed, "last", "logit", "ssp", 1.0, CAPPED),
        (Hashed, "product", "logit", "multinomial", 1.0, SEGMENTED),  # its_hub's own settings
        (HashedLater, "product", "logit", "multinomial", 1.0, CAPPED),
        (Hashed, "min", "log", "systematic", 1.0, SEGMENTED),
        (HashedLater, "min", "logit", "ssp", 0.5, CAPPED),
        (Hashed, "product", "log", "systematic", 1.0, {}),
    ],
)
def test_unbiased(tiny, kind, aggregate, scale, scheme, threshold, way):
    """E[Ẑ] = Z and E[Ẑ ΣWf] by enumeration, within 4 standard errors, and every weight as defined."""
    reward, engine = (
        kind(aggregate=aggregate, scale=scale),
        GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS)),
    )
    params = SMCParams(
        n_particles=5, max_tokens=STEPS, resampling=scheme, ess_threshold=threshold, seed=3, proposal="base", **way
    )
    origin = set_up(reward, engine)
    groups = [Group(replace(params, group=i), origin, PROMPT, tiny.stop, engine=engine) for i in range(150)]
    populations = run_tables(tiny, groups)
    truth = {s: math.exp(lp + log_phi(reward, s, params)) for s, lp in tiny.log_p.items()}
    for f in (lambda s: 1.0, lambda s: float(len(s)), lambda s: float(2 in s), lambda s: float(s[0] == 1)):
        want = sum(p * f(s) for s, p in truth.items())
        got = np.array([
            np.mean([math.exp(w) * f(tuple(ids)) for w, ids in zip(p.log_weights, p.token_ids, strict=True)])
            for p in populations
        ])  # fmt: skip
        assert abs(got.mean() - want) < 4 * got.std(ddof=1) / math.sqrt(len(got)), (got.mean(), want)
    plain = replace(params, n_particles=40, ess_threshold=0.0)  # weights are φ then
    [alone] = run_tables(tiny, [Group(plain, origin, PROMPT, tiny.stop, engine=engine)])
    expected = [log_phi(reward, ids, params) for ids in alone.token_ids]
    np.testing.assert_allclose(alone.log_weights, expected, atol=1e-9)


@pytest.mark.parametrize("aggregate", ["last", "product"])
def test_unbiased_in_a_product_that_guides(tiny, aggregate):
    """Beside a factor with `logw_next` the reward is asked at boundaries all the same."""
    engine = GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS))
    reward, liked = Hashed(aggregate=aggregate), Lexicon(token_ids=[0, 2], weight=0.7)
    params = SMCParams(n_particles=5, max_tokens=STEPS, ess_threshold=1.0, seed=3, segment=".")
    origin = set_up(Product(liked, reward), engine)
    groups = [Group(replace(params, group=i), origin, PROMPT, tiny.stop, engine=engine) for i in range(150)]
    populations = run_tables(tiny, groups)
    truth = {
        s: math.exp(lp + log_phi(reward, s, params) + 0.7 * sum(v in (0, 2) for v in s)) for s, lp in tiny.log_p.items()
    }
    for f in (lambda s: 1.0, lambda s: float(len(s)), lambda s: float(2 in s)):
        want = sum(p * f(s) for s, p in truth.items())
        got = np.array([
            np.mean([math.exp(w) * f(tuple(ids)) for w, ids in zip(p.log_weights, p.token_ids, strict=True)])
            for p in populations
        ])  # fmt: skip
        assert abs(got.mean() - want) < 4 * got.std(ddof=1) / math.sqrt(len(got)), (got.mean(), want)


def test_a_group_asks_once_per_boundary_and_text(tiny):
    asked = []

    class Counted(Hashed):
        def score(self, texts):
            asked.append(texts)
            return super().score(texts)

    engine = GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS))
    params = SMCParams(n_particles=64, max_tokens=STEPS, proposal="base", segment=".", ess_threshold=1.0)
    [population] = run_tables(tiny, [Group(params, set_up(Counted(), engine), PROMPT, tiny.stop, engine=engine)])
    per_boundary = len(population.boundaries)
    assert per_boundary <= len(asked) <= 2 * per_boundary  # prefix, and complete
    assert all(len(texts) == len(set(texts)) for texts in asked)
    assert sum(map(len, asked)) < 64


@pytest.mark.parametrize("later", [False, True])
def test_a_failing_reward_ends_its_own_group(tiny, later):
    class Failing(Hashed):
        in_background = later

        def score(self, texts):
            raise RuntimeError("the server has gone")

    engine = GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS))
    params = SMCParams(n_particles=8, max_tokens=STEPS, proposal="base", segment=".")
    failing, fine = (set_up(reward, engine) for reward in (Failing(), Hashed()))
    groups = [Group(params, potential, PROMPT, tiny.stop, engine=engine) for potential in (failing, fine)]
    step_tables(tiny, groups)
    assert "Failing" in str(groups[0].error) and "the server has gone" in str(groups[0].error)
    assert groups[1].error is None and groups[1].population().log_z < 0


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
