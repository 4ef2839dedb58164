"""Potentials that are asked for several groups at once give each group what it gets when it is asked alone."""

import itertools

import numpy as np
import pytest
import torch
from test_device import HIDDEN, POTENTIALS, LastToken
from test_potentials import EOS, V, tokenizer  # noqa: F401

from fastsmc import SMCParams
from fastsmc.potentials.joint import is_joinable
from fastsmc.smc import Group, GroupEngine, arrange, finish
from fastsmc.twists import Card, Head, Twist

STEPS = 7


class TogetherOnACPU(Twist):
    """A twist as on a GPU."""

    per_particle = ("_features", "_log_psi", "_last")


def twist(kind, loss="ctl"):
    """A twist that says something, of a head with random parameters."""
    torch.manual_seed(1)
    rank = None if kind == "linear" else 4
    head = Head(HIDDEN, V, rank)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5)
    card = Card(
        kind=kind, loss=loss, base_model="m", vocab_size=V, hidden_size=HIDDEN, input_size=HIDDEN, rank=rank or HIDDEN,
        tokenizer=None,
    )  # fmt: skip
    return TogetherOnACPU(card, head)


JOINT = {name: POTENTIALS[name] for name in ("lexicon", "regex", "grammar", "infill", "infill every step", "product")}
TWISTS = ("linear twist", "perceptron", "proposal-only twist")
JOINT["linear twist"] = lambda: twist("linear").guide(POTENTIALS["infill"]())
JOINT["perceptron"] = lambda: twist("mlp").guide(POTENTIALS["regex"]())
JOINT["proposal-only twist"] = lambda: twist("linear", "dpg").guide(POTENTIALS["lexicon"]())


@torch.inference_mode()
def run(groups, rng=None):
    """Runs groups in shared passes; with `rng` only some take a step each time."""
    model = LastToken(1, "cpu")
    calls = []

    def score(scores):
        wants, parts = scores.wants, []
        for (begin, end), ids, group in zip(
            itertools.pairwise(wants.bounds), scores.continuations, wants.groups, strict=True
        ):
            rows = wants.tokens[begin:end], wants.slots[begin:end]
            parts.append(
                model.continuation_log_prob(*rows, ids, group.p0, group.t + 1) if end > begin else torch.zeros(0)
            )
        return torch.cat(parts).double()

    while going := [group for group in groups if not group.done]:
        ready = [group for group in going if rng is None or rng.random() < 0.8] or going
        for cohort in arrange(ready):
            cohort.scorer = score
            wants = cohort.wants()
            calls.append(len(cohort._asked))
            finish(cohort.take(*model.next(wants.tokens, wants.slots)), score)
    assert all(group.error is None for group in groups), [group.error for group in groups]
    return [group.population() for group in groups], calls


@pytest.mark.parametrize(
    ("name", "proposal"),
    [(name, p) for name in JOINT for p in ("twisted", "base") if (name, p) != ("proposal-only twist", "base")],
)
def test_a_group_gets_what_it_gets_alone(tokenizer, name, proposal):  # noqa: F811
    """The same bits, but for a twist's products, whose rows have others among other numbers of rows."""
    engine, potential = GroupEngine(tokenizer, "cpu", V, HIDDEN, model_name="m"), JOINT[name]()
    potential.setup(engine)
    assert is_joinable(potential)

    def make(i):
        params = SMCParams(
            n_particles=(1, 5, 16)[i % 3], max_tokens=STEPS, ess_threshold=(1.0, 0.5)[i % 2], proposal=proposal, seed=i,
            temperature=(1.0, 0.8)[i // 3],
        )  # fmt: skip
        return Group(params, potential, [1], {EOS}, "cpu", engine)

    alone = [run([make(i)])[0][0] for i in range(6)]
    together, calls = run([make(i) for i in range(6)])
    assert set(calls) == {1}  # always one question for all
    apart, _ = run([make(i) for i in range(6)], np.random.default_rng(0))
    for want, *others in zip(alone, together, apart, strict=True):
        for got in others:
            assert got.token_ids == want.token_ids and (got.ancestors == want.ancestors).all()
            for field in ("log_z", "log_weights", "step_log_weights", "ess"):
                difference = 1e-5 if name in TWISTS else 0
                np.testing.assert_allclose(getattr(got, field), getattr(want, field), rtol=difference, atol=difference)
