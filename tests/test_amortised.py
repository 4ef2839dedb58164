"""One twist for many prompts, and for whatever must follow: what it gives, how it is learned, files and refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from test_device import HIDDEN
from test_joint import TogetherOnACPU, run
from test_potentials import V
from tiny import PROMPT, TinyLlama, make_llama

from fastsmc import Potential, SMCParams
from fastsmc.hf import HFEngine, Trunk
from fastsmc.potentials import Final, Infill, Lexicon
from fastsmc.prompts import TwistPrompt, read_twist_prompts
from fastsmc.smc import Group, GroupEngine, SMCError
from fastsmc.training import Trainer, TwistConfig
from fastsmc.twists import Card, Head, Twist, add_lora, card_potential

VOCAB, STEPS, PLACES = 8, 3, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Llama whose next token hangs on the last one more than on those before, as words do."""
    from transformers import AutoModelForCausalLM

    path = make_llama(tmp_path_factory.mktemp("base"), VOCAB, scale=0.25)
    model = AutoModelForCausalLM.from_pretrained(path)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.3
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hf(path):
    return HFEngine(path, stop_token_ids=[])


def conditional(kind, path, maker=Twist, size=64, vocab=VOCAB, loss="ctl"):
    """A conditional twist with random weights, to which the continuation makes a difference."""
    torch.manual_seed(0)
    trunk, extra = None, {}
    if kind == "lora":
        trunk, extra = Trunk.load(path), {"lora_rank": 2, "lora_alpha": 4.0}
        for adapter in add_lora(trunk.model, rank=2, alpha=4.0).values():
            torch.nn.init.normal_(adapter.b, std=0.1)
    elif kind == "model":
        trunk = Trunk.load(path)
    head = Head(size, vocab, 16, PLACES)
    with torch.no_grad():
        head.features[-1].weight.normal_(std=0.5)
        head.bias.normal_(std=0.3)
    card = Card(
        kind=kind, loss=loss, base_model=str(path), vocab_size=vocab, hidden_size=size, tokenizer=None,
        input_size=size, rank=16, continuation_tokens=PLACES, **extra,
    )  # fmt: skip
    return maker(card, head, trunk)


def by_hand(twist, hidden, follow):
    """(V,) log ψ of every next token, from the parts of the perceptron: the first M tokens of `follow` count."""
    head = twist.head
    norm, first, _, last = head.features
    with torch.no_grad():
        x = first(norm(hidden))
        for j, token in enumerate(follow[:PLACES]):
            x = x + head.out[token] @ head.places[j]
        return (head.out @ last(torch.nn.functional.gelu(x)) + head.bias).double()


class Checked(Twist):
    """Compares what it gives with a full recompute from the history and c, at every step."""

    shared_by_groups = ("seen", "base", "follow_ids")

    def direct(self, prompt, tokens):
        with torch.no_grad():
            hidden = (self.trunk or self.base).hidden(prompt, torch.tensor([[*tokens, 0]]))[0, -1]
        return by_hand(self, hidden, self.follow_ids)

    def logw_next(self, state):
        rows = super().logw_next(state)
        for i, tokens in enumerate(state.tokens.tolist()):
            before = self.direct(state.prompt, tokens[:-1])[tokens[-1]] if tokens else 0.0
            got = rows.values[rows.index[i]].double()
            assert (got - (self.direct(state.prompt, tokens) - before)).abs().max() < 1e-4, (i, state.step)
        self.seen.append(state.step)
        return rows

    def prefix(self, state):
        out = super().prefix(state)
        for i, tokens in enumerate(state.tokens.tolist()):
            if tokens and len(tokens) < state.max_tokens:
                assert abs(out[i] - self.direct(state.prompt, tokens[:-1])[tokens[-1]]) < 1e-4, (i, state.step)
        self.seen.append(state.step)
        return out


@pytest.mark.parametrize("kind", ["mlp", "lora", "model"])
@pytest.mark.parametrize(
    ("proposal", "follow"), [("twisted", [1, 6]), ("twisted", [6]), ("twisted", [6, 1, 3]), ("base", [6, 1])]
)
def test_values(hf, path, kind, proposal, follow):
    """ψ(s, c) of each particle's own history, through resampling at every step, for continuations of any length."""
    twist = conditional(kind, path, Checked)
    twist.base, twist.seen, twist.follow_ids = hf.trunk, [], follow
    params = SMCParams(n_particles=7, max_tokens=4, ess_threshold=1.0, proposal=proposal, resampling="multinomial")
    population = hf.smc(PROMPT, params, twist.guide(Infill(follow)))
    assert max(twist.seen) == 3 and population.resampled[1:3].all()


def test_unbiased_for_any_continuation_from_one_directory(hf, path, tmp_path):
    """E[Ẑ] = Z by enumeration for two continuations, and each has proposals of its own."""
    conditional("mlp", path).save(tmp_path)
    tiny, longer = (TinyLlama(path, VOCAB, steps, frozenset()) for steps in (STEPS, STEPS + 2))
    params, drawn = SMCParams(n_particles=8, max_tokens=STEPS, ess_threshold=1.0), []
    for follow in ([1, 6], [5]):

        def log_phi(s, follow=follow):
            return sum(longer.table[(*s, *follow[:j])][v] for j, v in enumerate(follow))

        populations = hf.smc([PROMPT] * 150, params, Infill(follow), twist=tmp_path)
        ratio = np.exp([p.log_z - tiny.log_z(log_phi) for p in populations])
        assert abs(ratio.mean() - 1) <= 3.5 * ratio.std(ddof=1) / math.sqrt(len(ratio))
        assert ratio.std() > 0.01
        never = dataclasses.replace(params, n_particles=200, ess_threshold=0.0)  # so φ has no say in what is drawn
        drawn.append(hf.smc(PROMPT, never, Infill(follow), twist=tmp_path).token_ids)
    assert drawn[0] != drawn[1]


class Together(TogetherOnACPU):
    """A conditional twist as on a GPU."""

    per_particle = ("_features", "_log_psi", "_last")


def test_continuations_do_not_mix():
    """Groups of different continuations that share passes, some of them asked together, have what each has alone."""
    twist = conditional("mlp", "m", Together, HIDDEN, V)
    engine = GroupEngine(None, "cpu", V, HIDDEN, model_name="m")
    guided = [twist.guide(Infill(follow)) for follow in ([1, 2], [3], [2, 1])]
    for potential in guided:
        potential.setup(engine)

    def make(i, which):
        params = SMCParams(n_particles=(5, 8)[i % 2], max_tokens=5, ess_threshold=1.0, seed=i)
        return Group(params, guided[which], [1], set(), "cpu", engine)

    order = [0, 1, 0, 2, 1]
    alone = [run([make(i, which)])[0][0] for i, which in enumerate(order)]
    together, calls = run([make(i, which) for i, which in enumerate(order)])
    assert set(calls) == {3}  # one question per continuation
    for want, got in zip(alone, together, strict=True):
        assert got.token_ids == want.token_ids
        np.testing.assert_allclose(got.step_log_weights, want.step_log_weights, rtol=1e-5, atol=1e-5)
    other = run([make(0, 2)])[0][0]  # [2, 1] is not [1, 2]
    assert not np.allclose(other.step_log_weights[0], alone[0].step_log_weights[0], atol=1e-3)


# -- learning ----------------------------------------------------------------------------------------------------------
#: all prompts of four tokens in random order, of which the first ones are trained on
PROMPTS = [
    TwistPrompt([int(digit) for digit in np.base_repr(VOCAB**4 + i, VOCAB)[1:]])
    for i in np.random.default_rng(0).permutation(VOCAB**4).tolist()
]
HELD_OUT = PROMPTS[-30:]
PARAMS = SMCParams(n_particles=64, max_tokens=1, ignore_eos=True, seed=3)
SETTINGS = {"rank": 32, "lr": 0.01, "prompts_per_step": 4, "eval_particles": 4, "eval_runs": 2}


def improvement(hf, trainer):
    """KL(q‖σ) of p0 minus that of the twist's proposal: the mean over the held-out prompts, and its standard error."""
    many, gains, errors = dataclasses.replace(PARAMS, n_particles=256, ess_threshold=0.0), [], []
    for place, judged in enumerate(trainer._judged):
        target, _ = trainer._exact_of(place, judged)
        potential = trainer._potential(target)
        weights = [
            hf.smc(target.prompt, many, p).log_weights for p in (trainer.twist.guide(potential), Final(potential))
        ]
        gains.append(weights[0].mean() - weights[1].mean())
        errors.append(math.sqrt(sum(w.var(ddof=1) / len(w) for w in weights)))
    return np.mean(gains), math.hypot(*errors) / len(errors)


def test_a_conditional_twist_learns_for_prompts_and_continuations_that_it_has_not_seen(hf, tmp_path):
    config = TwistConfig(
        continuation_tokens=1, positives="joint", pairs_per_prompt=64, steps=40, eval_every=40, **SETTINGS
    )
    trainer = Trainer(hf, PROMPTS[:160], PARAMS, None, config, tmp_path, held_out=HELD_OUT)
    trainer.run()
    gain, error = improvement(hf, trainer)
    assert gain > 3 * error and gain > 0.1
    card = Card.read(tmp_path)
    assert {"lower", "upper", "gap", "gap_se"} <= card.held_out["before"].keys() & card.held_out["after"].keys()
    assert (card.prompt, card.prompts["count"], card.held_out["count"]) == (None, 160, 30)
    assert (card.continuation_tokens, card.potential, card.held_out["after"]["step"]) == (1, "infill", 40)


def test_continuations_that_are_given(hf):
    """Rows say what must follow, positives are the samples: one prompt, with a proposal per continuation."""
    rows = [TwistPrompt(PROMPT, [token]) for token in (1, 6)]
    config = TwistConfig(samples="twisted", continuation_tokens=1, steps=60, **SETTINGS | {"prompts_per_step": 2})
    trainer = Trainer(hf, rows, PARAMS, None, config)
    trainer.run()
    gain, error = improvement(hf, trainer)
    assert gain > 3 * error and gain > 0.1


class Scaled(Potential):
    """log φ = 1.5 × the number of tokens below 3, + 40 × the prompt's first token."""

    def reset(self, n_particles, prompt):
        self.token = prompt[0]

    def complete(self, state):
        few = (state.tokens >= 0) & (state.tokens < 3)
        return 1.5 * few.sum(1).double() + 40.0 * self.token


def test_one_twist_for_many_prompts(hf, tmp_path):
    """What is learned of a potential holds for prompts not seen, although normalisers are orders of magnitude apart."""
    config = TwistConfig(samples="twisted", steps=40, eval_every=40, **SETTINGS)
    trainer = Trainer(hf, PROMPTS[:160], PARAMS, Scaled(), config, tmp_path, held_out=HELD_OUT)
    trainer.run()
    gain, error = improvement(hf, trainer)
    assert gain > 3 * error and gain > 0.1
    card = Card.read(tmp_path)
    assert (card.continuation_tokens, card.prompts["count"], card.held_out["count"]) == (0, 160, 30)
    assert card.held_out["after"]["lower"] > card.held_out["before"]["lower"]


@pytest.mark.parametrize("loss", ["ctl", "rl", "sixo", "dpg"])
def test_weights_are_compared_within_a_prompt(hf, loss):
    """The loss of a step with three prompts is the mean of theirs."""

    def losses(steps, per_step):
        config = TwistConfig(loss=loss, steps=steps, prompts_per_step=per_step, rank=8, lr=1e-12)
        trainer = Trainer(hf, PROMPTS[:3], PARAMS, Scaled(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            trainer.twist.head.features[-1].weight.normal_()
        return [trainer.step()["loss"] for _ in range(steps)]

    apart = losses(3, 1)
    assert len({round(value, 3) for value in apart}) == 3
    np.testing.assert_allclose(losses(1, 3), [np.mean(apart)], rtol=1e-4)


def test_every_prompt_once_per_lap(hf):
    config = TwistConfig(steps=6, prompts_per_step=2, rank=8)
    trainer = Trainer(hf, PROMPTS[:4], PARAMS, Scaled(), config)
    seen = []
    for _ in range(6):
        trainer.step()
        seen += [tuple(samples.prompt) for samples in trainer._samples]
    laps = [seen[:4], seen[4:8], seen[8:]]
    assert all(len(set(lap)) == 4 for lap in laps) and len(set(map(tuple, laps))) > 1


def test_joint_draws_are_exact(hf, path):
    """Of (s, c) ~ p0 the pair has its law: counts of whole sequences within 4.5 standard errors."""
    config = TwistConfig(continuation_tokens=1, positives="joint", rank=8)
    trainer = Trainer(hf, PROMPT, PARAMS, None, config)
    counts = np.zeros((VOCAB, VOCAB))
    for place in range(150):
        pairs = trainer._joint(trainer.targets[0], 1, place, 11)
        assert pairs.tokens.shape == pairs.following.shape == (1, 1)
        counts[int(pairs.tokens), int(pairs.following)] += 1
    for (a, b), log_p in TinyLlama(path, VOCAB, 2, frozenset()).log_p.items():
        p = math.exp(log_p)
        assert abs(counts[a, b] - 150 * p) <= 4.5 * math.sqrt(150 * p * (1 - p)) + 1, (a, b)


def test_a_run_goes_on_where_it_stopped(hf, tmp_path):
    """The same bits: prompts, continuations, samples and positives in the middle of `refresh` among them."""
    settings = {**SETTINGS, "prompts_per_step": 2, "refresh": 3}
    config = TwistConfig(
        continuation_tokens=1, positives="joint", steps=9, checkpoint_every=4, eval_every=3, **settings
    )

    def make(name):
        return Trainer(hf, PROMPTS[:5], PARAMS, None, config, tmp_path / name, held_out=HELD_OUT[:2])

    whole, part = make("whole"), make("part")
    whole.run()
    step = part.step
    part.step = lambda: step() if part._step < 7 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    again = make("part")
    again.run()
    for a, b in zip(whole.twist.head.parameters(), again.twist.head.parameters(), strict=True):
        assert torch.equal(a, b)
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in t.history] for t in (whole, again)]
    assert timeless[0] == timeless[1]
    assert Card.read(tmp_path / "whole") == Card.read(tmp_path / "part")
    trainer = make("part")
    trainer.step()
    trainer._save_checkpoint()
    with pytest.raises(ValueError, match="another configuration"):  # other prompts
        Trainer(hf, PROMPTS[:6], PARAMS, None, config, tmp_path / "part", held_out=HELD_OUT[:2]).run()


# -- files and refusals ------------------------------------------------------------------------------------------------
def test_files(hf, path, tmp_path):
    """A loaded twist gives the population of the one that was saved; cards of before load."""
    twist = conditional("mlp", path)
    twist.save(tmp_path)
    params = SMCParams(n_particles=6, max_tokens=STEPS, ess_threshold=1.0)
    saved, loaded = (
        hf.smc(PROMPT, params, twist.guide(Infill([1, 6]))), hf.smc(PROMPT, params, Infill([1, 6]), twist=tmp_path)
    )  # fmt: skip
    assert saved.token_ids == loaded.token_ids and np.allclose(saved.log_weights, loaded.log_weights, atol=1e-6)
    assert Card.read(tmp_path) == twist.card

    plain = Twist(dataclasses.replace(twist.card, continuation_tokens=0), Head(64, VOCAB, 16))
    plain.save(tmp_path)
    file = tmp_path / "card.json"
    card = json.loads(file.read_text())
    for name in ("prompts", "held_out", "continuation_tokens"):
        del card[name]
    file.write_text(json.dumps(card))
    assert Twist.load(tmp_path).card == plain.card


def test_what_a_conditional_twist_refuses(hf, path, tmp_path):
    twist, params = conditional("mlp", path), SMCParams(n_particles=4, max_tokens=2)
    for potential, n in ((Lexicon(token_ids=[1], weight=1.0), 0), (Infill([1]) * Infill([2]), 2)):
        with pytest.raises(ValueError, match=f"one Infill, not {n}"):
            twist.guide(potential)
    hf.smc(PROMPT, params, twist.guide(Lexicon(token_ids=[1], weight=1.0) * Infill([1])))
    with pytest.raises(SMCError, match="conditional on what must follow"):
        hf.smc(PROMPT, params, twist * Final(Infill([1])))
    with pytest.raises(ValueError, match="continuation_tokens=2: must be 0 with kind='linear'"):
        dataclasses.replace(twist.card, kind="linear")
    twist.save(tmp_path)
    with pytest.raises(ValueError, match="conditional on what must follow; give the potential"):
        card_potential(tmp_path)
    twist.card = dataclasses.replace(twist.card, continuation_tokens=3)
    twist.save(tmp_path)  # the file has 2 places
    with pytest.raises(ValueError, match=r"places"):
        Twist.load(tmp_path)


def test_what_training_refuses(hf):
    for bad, why in (
        ({"continuation_tokens": -1}, "continuation_tokens"),
        ({"continuation_tokens": 2, "kind": "linear"}, "kind='linear'"),
        ({"continuation_tokens": 2, "compose": True, "samples": "twisted"}, "compose"),
        ({"positives": "joint"}, "continuation_tokens"),
        ({"positives": "joint", "continuation_tokens": 1, "samples": "twisted"}, "samples='base'"),
        ({"positives": "joint", "continuation_tokens": 1, "loss": "rl"}, "loss='ctl'"),
        ({"prompts_per_step": 0}, "prompts_per_step"),
    ):
        with pytest.raises(ValueError, match=why):
            TwistConfig(**bad)
    both, only = TwistPrompt([1, 2], [3]), TwistPrompt([1, 2])
    given = {"continuation_tokens": 1}
    joint = {"continuation_tokens": 1, "positives": "joint"}
    eos = dataclasses.replace(PARAMS, stop_token_ids=[5])
    for prompt, params, potential, config, more, why in (
        ([only], PARAMS, None, {}, {}, "potential=NoneType: must be a Potential"),
        ([both], PARAMS, Infill([1]), given, {}, "potential=Infill: must be None"),
        ([only], PARAMS, None, given, {}, r"prompts\[0\]: has no continuation"),
        ([only, both], PARAMS, None, joint, {}, r"prompts\[1\]: has a continuation"),
        ([only, both], PARAMS, Infill([1]), {}, {}, r"prompts\[1\]: has a continuation"),
        ([only, [1]], PARAMS, Infill([1]), {}, {}, r"prompts\[1\].*TwistPrompt"),
        ([only, TwistPrompt("text")], PARAMS, Infill([1]), {}, {}, r"prompts\[1\].*tokenizer"),
        ([only, TwistPrompt([1, VOCAB])], PARAMS, Infill([1]), {}, {}, r"prompts\[1\].*vocabulary"),
        ([only, TwistPrompt([1] * 512)], PARAMS, Infill([1]), {}, {}, r"prompts\[1\].*positions"),
        ([only], PARAMS, Infill([1]), {"positives": "rejection"}, {}, "'smc' or 'joint'"),
        ([only], PARAMS, Infill([1]), {}, {"exact": [[1]]}, "'smc' or 'joint'"),
        ([only], eos, None, joint, {}, "ignore_eos=True and no stop tokens"),
        ([only], PARAMS, Infill([1]), {}, {"held_out": [only]}, r"held_out\[0\]: is among"),
        ([both], PARAMS, None, given, {"held_out": [only]}, r"held_out\[0\]: has no"),
        ([both], PARAMS, None, given, {"held_out": [both]}, r"held_out\[0\]: is among"),
        ([only], PARAMS, None, joint, {"held_out": [both]}, r"held_out\[0\]: is among"),  # it may draw that, too
        (PROMPTS[:2], PARAMS, Infill([1]), {"eval_every": 1}, {}, "needs held_out"),
    ):
        with pytest.raises(ValueError, match=why):
            Trainer(hf, prompt, params, potential, TwistConfig(**config), **more)
    Trainer(hf, [both], PARAMS, None, TwistConfig(**given), held_out=[TwistPrompt([1, 2], [4])])  # another target


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no prompts"),
        ("\n \n", "has no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: is not JSON"),
        ('{"prompt": "a"}\n\n[1]', "line 3: [1]: must be an object"),
        ('{"prompt": "a"}\n{"continuation": "b"}', "line 2: has no 'prompt'"),
        ('{"prompt": "a", "Continuation": "b"}', "line 1: holds 'Continuation'; may hold 'prompt', 'continuation'"),
        ('{"prompt": ""}', "line 1: prompt='': is empty"),
        ('{"prompt": []}', "line 1: prompt=[]: is empty"),
        ('{"prompt": [1, -1]}', "line 1: prompt[1]=-1: is not a token id"),
        ('{"prompt": 3}', "line 1: prompt=3: must be a list"),
        ('{"prompt": "a", "continuation": ""}', "line 1: continuation='': is empty"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
    ],
)
def test_bad_files(tmp_path, text, why):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as told:
        read_twist_prompts(file)
    assert str(told.value).startswith(str(file)) and why in str(told.value)


def test_good_files(tmp_path):
    """Text and token ids, blank lines, line separators within a text, an explicit null."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a\u2028b"}\r\n\n{"prompt": [1, 2], "continuation": [3]}\n{"prompt": "c", "continuation": null}'
    )
    assert read_twist_prompts(file) == [TwistPrompt("a\u2028b"), TwistPrompt([1, 2], [3]), TwistPrompt("c")]
