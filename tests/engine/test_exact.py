"""E[Ẑ] = Z and E[Ẑ · Σ W f] = Z · E_σ[f] by enumeration, through the real engine."""

import itertools

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableTwist, TinyLlama, run_each, run_table, value_table

from fastsmc import Potential, SMCParams, reference
from fastsmc.params import RESAMPLING_SCHEMES
from fastsmc.potentials import Infill

from .conftest import VOCAB
from .test_twist import save_twist

STEPS, STOP = 4, 5
POTENTIAL = TableTwist(value_table(STEPS, VOCAB))


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return TinyLlama(tiny_path, VOCAB, STEPS, frozenset([STOP]))


def check_unbiased(tiny, populations, log_phi):
    """Ẑ, and Ẑ times the weighted share of each length and first token, within 4 standard errors of truth.

    First tokens rarer than 15 % are left out: so few runs hit them that their standard error could not be trusted.
    """
    z = np.exp(tiny.log_z(log_phi))
    posterior = tiny.posterior(log_phi)
    features = {"one": lambda s: 1.0}
    often = [v for v in range(VOCAB) if np.exp(tiny.table[()][v]) > 0.15]
    features |= {f"first={v}": lambda s, v=v: float(s[0] == v) for v in often}
    features |= {f"length={k}": lambda s, k=k: float(len(s) == k) for k in range(1, STEPS + 1)}
    for name, feature in features.items():
        want = z * sum(p * feature(s) for s, p in posterior.items())
        got = np.array(
            [np.mean(np.exp(p.log_weights) * [feature(t) for t in map(tuple, p.token_ids)]) for p in populations]
        )
        error = got.std(ddof=1) / np.sqrt(len(got))
        assert abs(got.mean() - want) <= 4 * error + 1e-9, (name, got.mean(), want, error)
    assert np.allclose(
        [p.log_z for p in populations], [np.log(np.mean(np.exp(p.log_weights))) for p in populations], atol=1e-9
    )


#: each scheme at each threshold, each of both with both proposals; what is beyond pairs is in the step alone, which
#: `test_engine_equals_table` says is the table's
PAIRS = [
    (scheme, threshold, ("twisted", "base")[(i + k) % 2])
    for i, scheme in enumerate(RESAMPLING_SCHEMES)
    for k, threshold in enumerate((0.0, 0.5, 1.0))
]


@pytest.mark.parametrize(("scheme", "threshold", "proposal"), PAIRS)
def test_unbiased_in_the_engine(engine, tiny, all_blocks_back, scheme, threshold, proposal):
    params = SMCParams(
        n_particles=7,
        max_tokens=STEPS,
        ess_threshold=threshold,
        resampling=scheme,
        proposal=proposal,
        stop_token_ids=[STOP],
        seed=11,
    )
    populations = engine.smc([PROMPT] * 80, params, POTENTIAL)
    check_unbiased(tiny, populations, POTENTIAL.log_phi)
    if threshold == 1.0:
        assert all(p.resampled[1:].all() for p in populations)
    if threshold == 0.0:
        assert not any(p.resampled.any() for p in populations)


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_unbiased_over_the_table(tiny, scheme, proposal):
    """The same with ten times the runs, stepped without an engine: a smaller standard error."""
    params = dict(n_particles=6, max_tokens=STEPS, ess_threshold=0.8, resampling=scheme, proposal=proposal)
    populations = run_each(tiny, [SMCParams(**params, seed=seed) for seed in range(600)], POTENTIAL)
    check_unbiased(tiny, populations, POTENTIAL.log_phi)


def test_engine_equals_table(engine, tiny):
    """The engine and the table give the same particles for the same seed."""
    powers = ({}, {"power": 2.0}, {"power": 0.5, "power_ramp": 3})
    for proposal, potential, power in itertools.product(("twisted", "base"), (POTENTIAL, None), powers):
        params = SMCParams(
            n_particles=33, max_tokens=STEPS, ess_threshold=0.9, proposal=proposal, stop_token_ids=[STOP], seed=5,
            **power,
        )  # fmt: skip
        a, b = engine.smc(PROMPT, params, potential), run_table(tiny, params, potential)
        assert a.token_ids == b.token_ids
        assert np.allclose(a.log_weights, b.log_weights, atol=1e-4)
        assert np.array_equal(a.ancestors, b.ancestors) and np.array_equal(a.resampled, b.resampled)


class OptimalTwist(TableTwist):
    """ψ* by dynamic programming: every weight is equal, and log Ẑ = log Z with no variance."""

    def __init__(self, tiny, log_phi):
        self.tiny, self.log_psi = tiny, {}

        def walk(prefix):
            if len(prefix) == tiny.steps or (prefix and prefix[-1] in tiny.stop):
                self.log_psi[prefix] = log_phi(prefix)
            else:
                below = [tiny.table[prefix][v] + walk((*prefix, v)) for v in range(tiny.vocab)]
                self.log_psi[prefix] = float(np.logaddexp.reduce(below))
            return self.log_psi[prefix]

        walk(())

    def _of(self, state):
        import torch

        rows = [tuple(t for t in row if t >= 0) for row in state.tokens.tolist()]
        return torch.tensor([self.log_psi[row] for row in rows], dtype=torch.float64), rows

    def prefix(self, state):
        return self._of(state)[0]

    def complete(self, state):
        return self._of(state)[0]

    def logw_next(self, state):
        import torch

        now, rows = self._of(state)
        after = torch.zeros((len(rows), self.tiny.vocab), dtype=torch.float64)
        for i, row in enumerate(rows):
            if not state.finished[i]:
                after[i] = torch.tensor([self.log_psi[(*row, v)] for v in range(self.tiny.vocab)])
        return after - now[:, None]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_optimal_twist_has_no_variance(engine, tiny, threshold):
    value = value_table(STEPS, VOCAB, seed=3)
    log_phi = TableTwist(value).log_phi
    params = SMCParams(n_particles=5, max_tokens=STEPS, ess_threshold=threshold, stop_token_ids=[STOP])
    for population in engine.smc([PROMPT] * 4, params, OptimalTwist(tiny, log_phi)):
        assert abs(population.log_z - tiny.log_z(log_phi)) < 2e-5
        assert np.allclose(population.weights, 1 / 5, atol=2e-5)


def test_plain_ancestral_sampling(engine, tiny):
    """No potential: log Z = 0, weights equal, log-probs those of the table, first tokens by p0."""
    params = SMCParams(n_particles=1000, max_tokens=STEPS, stop_token_ids=[STOP], seed=2, ess_threshold=1.0)
    population = engine.smc(PROMPT, params)
    assert population.log_z == 0.0 and np.all(population.log_weights == 0.0) and not population.resampled.any()
    for tokens, log_p in zip(population.token_ids, population.log_probs, strict=True):
        assert abs(log_p - tiny.log_p[tuple(tokens)]) < 1e-4
    counts = np.bincount([t[0] for t in population.token_ids], minlength=VOCAB)
    assert np.all(np.abs(counts - 1000 * np.exp(tiny.table[()])) <= 1 + 1e-6)  # stratified: within one of expectation


def test_lead_is_a_posterior_sample(engine, tiny):
    """`generate` with smc keys gives one particle by weight: over seeds, close to the posterior."""
    params = SMCParams(n_particles=64, max_tokens=STEPS, stop_token_ids=[STOP], proposal="twisted", ess_threshold=0.5)
    name = engine.register_potential(POTENTIAL)
    runs = 400
    leads = [engine.lead_params(params, name, group=i) for i in range(runs)]
    outputs = engine.generate([{"prompt_token_ids": PROMPT}] * runs, leads, use_tqdm=False)
    engine.drop_potential(name)
    posterior = tiny.posterior(POTENTIAL.log_phi)
    first = np.zeros(VOCAB)
    for output in outputs:
        tokens = tuple(output.outputs[0].token_ids)
        assert posterior[tokens] > 0
        assert output.outputs[0].finish_reason == ("stop" if tokens[-1] == STOP else "length")
        first[tokens[0]] += 1
    for v in range(VOCAB):
        p = sum(q for s, q in posterior.items() if s[0] == v)
        assert abs(first[v] / runs - p) <= 4 * np.sqrt(p * (1 - p) / runs) + 0.01  # 0.01: bias of order 1/N


class Ends(Potential):
    """Ends a particle after token 3, and says nothing of its weight."""

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)

    def stop(self, state):
        return state.last_tokens == 3


class EndingTwist(TableTwist):
    stop = Ends.stop


@pytest.mark.parametrize("how", ["itself", "product", "twist"])
def test_potentials_that_end_particles(engine, tiny, tiny_path, tmp_path, all_blocks_back, how):
    """E[Ẑ] = Z over the sequences that `stop` completes; a lead then finishes with "stop", its last token kept."""
    value = value_table(STEPS, VOCAB)
    potential = POTENTIAL * Ends() if how == "product" else EndingTwist(np.where(np.isinf(value), -1.0, value))
    log_phi = POTENTIAL.log_phi if how == "product" else potential.log_phi
    twist = save_twist("mlp", tiny_path, tmp_path) if how == "twist" else None
    params = SMCParams(n_particles=7, max_tokens=STEPS, stop_token_ids=[STOP], ess_threshold=0.7, seed=21)
    target = tiny.restricted(params, lambda s: s[-1] == 3)
    check_unbiased(target, engine.smc([PROMPT] * 80, params, potential, twist=twist), log_phi)
    name = engine.register_potential(potential)
    leads = [engine.lead_params(params, name, group=i, twist=twist) for i in range(40)]
    outputs = engine.generate([{"prompt_token_ids": PROMPT}] * 40, leads, use_tqdm=False)
    engine.drop_potential(name)
    lasts = set()
    for output in outputs:
        [completion], summary = output.outputs, output.kv_transfer_params["smc"]
        assert (
            list(completion.token_ids) == summary["sample_token_ids"][0] and tuple(completion.token_ids) in target.log_p
        )
        assert completion.finish_reason == summary["sample_finish_reasons"][0]
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in (3, STOP) else "length")
        assert completion.stop_reason == (STOP if completion.token_ids[-1] == STOP else None)
        lasts.add(completion.token_ids[-1])
    assert {3, STOP} < lasts


def p0_of(model, params, ids):
    """log p0 (V,) under `params` after PROMPT and token ids, from Hugging Face's logits."""
    with torch.inference_mode():
        row = model(torch.tensor([PROMPT + ids])).logits[0, -1]
    names = ("temperature", "top_k", "top_p", "min_p", "logit_bias", "allowed_token_ids", "min_tokens")
    settings = {name: getattr(params, name) for name in names}
    z = reference.restrict(row.numpy(), len(ids), stop_token_ids=[STOP], **settings) / params.temperature
    return z - np.logaddexp.reduce(z)


def test_p0_of_all_settings(engine, tiny_path, all_blocks_back):
    """Log-probs are those of a recompute, for what was drawn and for a continuation, and E[Ẑ] = Z for a forced stop."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32).eval()
    params = SMCParams(
        n_particles=32, max_tokens=3, temperature=0.8, top_k=6, top_p=0.93, min_p=0.01, logit_bias={1: 1.0, 5: 0.5},
        allowed_token_ids=[0, 1, 2, 3, 5, 6], min_tokens=1, stop_token_ids=[STOP], seed=3, ess_threshold=0.0,
    )  # fmt: skip
    table: dict[tuple, np.ndarray] = {}

    def log_p0(ids):
        if tuple(ids) not in table:
            table[tuple(ids)] = p0_of(model, params, ids)
        return table[tuple(ids)]

    population = engine.smc(PROMPT, params, Infill([3, 6]))
    assert population.finish_reasons == ["stop" if ids[-1] == STOP else "length" for ids in population.token_ids]
    ruled_out = 0
    for ids, scores, log_w in zip(
        population.token_ids, population.token_log_probs, population.log_weights, strict=True
    ):
        want = [log_p0(ids[:t])[token] for t, token in enumerate(ids)]
        assert np.abs(scores[: len(ids)] - want).max() <= 5e-4
        follows = log_p0(ids)[3] + log_p0([*ids, 3])[6]
        ruled_out += follows == -np.inf
        assert log_w == follows or abs(log_w - follows) <= 5e-4
    assert 0 < ruled_out < 32

    forced = SMCParams(**{**vars(params), "force_stop": True, "n_particles": 4, "ess_threshold": 0.7, "group": 0})
    potential = TableTwist(value_table(3, VOCAB))

    def z_of(ids, log_p):
        if ids and ids[-1] == STOP:
            return np.exp(log_p + potential.log_phi(tuple(ids)))
        if len(ids) == 3:
            return 0.0
        row = log_p0(ids)
        return sum(z_of([*ids, v], log_p + row[v]) for v in range(VOCAB) if row[v] > -np.inf)

    populations = engine.smc([PROMPT] * 120, forced, potential)
    got = np.exp([p.log_z for p in populations])
    assert abs(got.mean() - z_of([], 0.0)) <= 4 * got.std(ddof=1) / np.sqrt(len(got))
    assert {r for p in populations for r, w in zip(p.finish_reasons, p.weights, strict=True) if w} == {"stop"}

    lead = engine.generate([{"prompt_token_ids": PROMPT}], engine.lead_params(params), use_tqdm=False)[0]
    summary = lead.kv_transfer_params["smc"]
    assert summary["p0"] == params.p0() and lead.outputs[0].token_ids[-1] < VOCAB
