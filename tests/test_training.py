"""Learning on a Markov model whose optimal twist is known by dynamic programming, and the run's files."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from tiny import make_llama

from fastsmc import Potential, SMCParams, evaluate
from fastsmc.hf import HFEngine, Trunk
from fastsmc.losses import ctl_loss, dpg_loss, fudge_loss, rl_loss, sixo_loss
from fastsmc.training import Trainer, TwistConfig
from fastsmc.twists import Twist, card_potential

V, T, STOP = 4, 4, 3
RNG = np.random.default_rng(0)
TABLE = torch.tensor(RNG.normal(size=(V + 1, V)), dtype=torch.float32).log_softmax(1)  # by last token; V: none yet
VALUE = torch.tensor(RNG.normal(size=(V + 1, V)) * 1.2 - 3.0)  # log φ by the last two tokens; below 0


class MarkovTrunk(Trunk):
    """p0 as a table of transitions; the hidden state says which step it is and what the last token was."""

    def __init__(self):
        self.model, self.device = None, torch.device("cpu")
        self.hidden_size, self.vocab_size = (T + 1) * (V + 1), V

    def unembedding(self):
        return torch.ones(V, self.hidden_size)

    def logits(self, hidden):
        return hidden.reshape(*hidden.shape[:-1], T + 1, V + 1).sum(-2) @ TABLE

    def _state(self, step, last):
        return torch.nn.functional.one_hot(step * (V + 1) + last, self.hidden_size).float()

    def start(self, prompt):
        return self._state(0, torch.tensor([V])), 0

    def next(self, cache, parents, tokens):
        return self._state(cache + 1, tokens), cache + 1

    def frozen_hidden(self, prompt, tokens):
        return self.hidden(prompt, tokens)

    def hidden(self, prompt, tokens):
        before = torch.cat([torch.full_like(tokens[:, :1], V), tokens[:, :-1].clamp(min=0)], dim=1)
        return self._state(torch.arange(tokens.shape[1]), before)


class Phi(Potential):
    """log φ is a function of the last two tokens."""

    def complete(self, state):
        tokens = torch.nn.functional.pad(state.tokens.clamp(min=0), (1, 0), value=V)
        last = state.lengths[:, None]
        return VALUE[tokens.gather(1, last - 1), tokens.gather(1, last)].squeeze(1)


def log_phi(sequence):
    return float(VALUE[(V, *sequence)[-2], sequence[-1]])


def walk(prefix=(), log_p=0.0):
    """Every complete sequence with its log p0."""
    if prefix and (len(prefix) == T or prefix[-1] == STOP):
        yield prefix, log_p
        return
    for v in range(V):
        yield from walk((*prefix, v), log_p + float(TABLE[prefix[-1] if prefix else V, v]))


SEQUENCES = dict(walk())
LOG_Z = float(np.logaddexp.reduce([lp + log_phi(s) for s, lp in SEQUENCES.items()]))


def optimal(prefix):
    """log ψ*, by dynamic programming."""
    if prefix and (len(prefix) == T or prefix[-1] == STOP):
        return log_phi(prefix)
    row = TABLE[prefix[-1] if prefix else V]
    return float(np.logaddexp.reduce([float(row[v]) + optimal((*prefix, v)) for v in range(V)]))


def learnt(twist, prefix):
    """(V,) log ψ of every next token."""
    tokens = torch.tensor([[*prefix, 0]])
    with torch.no_grad():
        return twist._link(twist.head(MarkovTrunk().hidden([0], tokens)[0, -1])).double().numpy()


def divergences(twist):
    """KL(q‖σ) and KL(σ‖q), by enumeration."""
    q_sigma = sigma_q = 0.0
    for s, log_p in SEQUENCES.items():
        log_q, log_sigma = 0.0, log_p + log_phi(s) - LOG_Z
        for t, v in enumerate(s):
            x = TABLE[s[t - 1] if t else V].double().numpy() + learnt(twist, s[:t])
            log_q += x[v] - np.logaddexp.reduce(x)
        q_sigma += math.exp(log_q) * (log_q - log_sigma)
        sigma_q += math.exp(log_sigma) * (log_sigma - log_q)
    return q_sigma, sigma_q


def log_ratio_spread(twist):
    """Largest standard deviation over t of log ψ_t − log ψ*_t under σ: 0 if they are proportional at every t."""
    worst = 0.0
    for t in range(1, T + 1):
        pairs = [(math.exp(lp + log_phi(s) - LOG_Z), s[:t]) for s, lp in SEQUENCES.items() if len(s) >= t]
        p = np.array([w for w, _ in pairs])
        d = np.array([learnt(twist, s[:-1])[s[-1]] - optimal(s) for _, s in pairs])
        mean = (p * d).sum() / p.sum()
        worst = max(worst, math.sqrt((p * (d - mean) ** 2).sum() / p.sum()))
    return worst


def engine():
    return HFEngine(MarkovTrunk(), name="markov", stop_token_ids=[STOP])


PARAMS = SMCParams(n_particles=2048, max_tokens=T, seed=1)


def train(directory=None, **config):
    settings = {"kind": "linear", "steps": 300, "batch_size": 2048, "lr": 0.05, "refresh": 6, **config}
    trainer = Trainer(engine(), [0], PARAMS, Phi(), TwistConfig(**settings), directory)
    return trainer, trainer.run()


def test_the_untrained_twist_is_p0():
    twist = Trainer(engine(), [0], PARAMS, Phi(), TwistConfig(kind="linear")).twist
    assert min(divergences(twist)) > 0.15  # so that there is something to learn


@pytest.mark.parametrize(
    ("config", "is_optimal"),
    [
        ({"loss": "ctl"}, True),
        ({"loss": "ctl", "samples": "twisted"}, True),
        ({"loss": "ctl", "positives": "rejection"}, False),
        ({"loss": "rl", "samples": "twisted"}, True),
        ({"loss": "rl"}, True),
        ({"loss": "sixo"}, False),
        ({"loss": "fudge"}, False),
        ({"loss": "dpg", "samples": "twisted"}, False),
        ({"loss": "dpg"}, False),
    ],
    ids=str,
)
def test_losses_find_the_optimal_twist(config, is_optimal):
    """KL below 0.02 both ways; where it is claimed, log ψ = log ψ* up to a constant at each t."""
    _, twist = train(**config)
    q_sigma, sigma_q = divergences(twist)
    assert 0 <= q_sigma < 0.02 and 0 <= sigma_q < 0.02, (q_sigma, sigma_q)
    if is_optimal:
        assert log_ratio_spread(twist) < 0.15
    assert twist.proposal_only == (config["loss"] == "dpg")


def test_the_optimal_twist_has_no_variance():
    """ψ* put into a head: every log weight is log Z, at every threshold, and both bounds meet there."""
    twist = Trainer(engine(), [0], PARAMS, Phi(), TwistConfig(kind="linear")).twist
    with torch.no_grad():
        for t in range(T):
            for last in range(V) if t else [V]:
                prefix = () if t == 0 else (*[0] * (t - 1), last)  # ψ* needs the step and the last two tokens only
                for v in range(V):
                    twist.head.out[v, t * (V + 1) + last] = optimal((*prefix, v))
    assert max(divergences(twist)) < 1e-6 and log_ratio_spread(twist) < 1e-6
    for threshold in (0.0, 0.5, 1.0):
        params = SMCParams(n_particles=5, max_tokens=T, ess_threshold=threshold)
        exact = [list(s) for s in itertools.islice(SEQUENCES, 3)]
        bounds = evaluate.log_z_bounds(engine(), [0], params, twist.guide(Phi()), exact=exact, runs=6)
        np.testing.assert_allclose(bounds.lower, LOG_Z, atol=2e-5)
        np.testing.assert_allclose(bounds.upper, LOG_Z, atol=2e-5)


def test_losses_by_hand():
    a = torch.tensor
    assert ctl_loss(
        a([[1.0, 2.0]]), a([[True, True]]), a([1.0]), a([[4.0, 0.0]]), a([[True, False]]), a([[1.0, 1.0]])
    ) == pytest.approx((4.0 - 3.0) / 2)
    assert rl_loss(a([[1.0, 9.0]]), a([[True, False]]), a([[3.0, -math.inf]])) == pytest.approx(4.0)
    one = a([[True]])
    s = 1 / (1 + math.exp(-1.0))
    assert sixo_loss(a([[1.0]]), one, a([1.0]), a([[1.0]]), one) == pytest.approx(-math.log(s) - math.log(1 - s))
    want = -(0.25 * math.log(s) + 0.75 * math.log(1 - s))
    assert fudge_loss(a([[1.0]]), one, a([math.log(0.25)])) == pytest.approx(want)
    assert dpg_loss(a([[1.0]]), a([[3.0]]), one, a([1.0])) == pytest.approx(2.0)


def test_a_run_leaves_its_files_and_goes_on_where_it_stopped(tmp_path):
    config = {"steps": 12, "refresh": 3, "checkpoint_every": 5, "positives": "rejection", "kind": "mlp", "rank": 8}
    _, whole = train(tmp_path / "whole", **config, eval_every=6)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(13)) and {"loss", "grad_norm", "lr"} <= lines[1].keys()
    assert all(r["lower"] <= r["upper"] + 1 for r in lines if "upper" in r)
    assert (tmp_path / "whole" / "bounds.png").stat().st_size > 5000
    assert not (tmp_path / "whole" / "checkpoint.pt").exists()

    trainer = Trainer(
        engine(), [0], PARAMS, Phi(), TwistConfig(**{"batch_size": 2048, "lr": 0.05, **config}), tmp_path / "part"
    )
    first_step = trainer.step
    trainer.step = lambda: first_step() if trainer._step < 8 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert (tmp_path / "part" / "checkpoint.pt").exists()
    _, resumed = train(tmp_path / "part", **config)
    for a, b in zip(whole.head.parameters(), resumed.head.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    steps = [json.loads(line)["step"] for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    again = Twist.load(tmp_path / "whole")
    assert again.card.steps == 12 and again.card.loss == "ctl" and again.card.settings["lr"] == 0.05
    with pytest.raises(ValueError, match="without a name"):
        card_potential(tmp_path / "whole")


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    trainer, _ = train(tmp_path, steps=2)
    trainer._save_checkpoint()
    with pytest.raises(ValueError, match="another configuration"):
        train(tmp_path, steps=3)


@pytest.mark.parametrize("kind", ["lora", "model"])
def test_trunks_of_their_own_learn(kind, tmp_path):
    """A tiny Llama: the proposal comes closer to the target, and what was saved is what was trained."""
    base = HFEngine(make_llama(tmp_path / "base", 8), stop_token_ids=[])
    small = str(make_llama(tmp_path / "small", 8, seed=3)) if kind == "model" else None
    params = SMCParams(n_particles=256, max_tokens=3, seed=2)
    config = TwistConfig(kind=kind, trunk=small, rank=16, steps=40, batch_size=256, refresh=20, lr=5e-3, amp=True)
    trainer = Trainer(base, [1, 2], params, Count(), config, tmp_path / "twist")
    twist = trainer.run()
    # −KL(q‖σ) + log Z, the mean log weight of the proposal without resampling
    many = SMCParams(n_particles=512, max_tokens=3, ess_threshold=0.0)
    base_kl, kl = (-base.smc([1, 2], many, p).log_weights.mean() for p in (Count(), twist.guide(Count())))
    assert kl < base_kl - 0.3, (kl, base_kl)
    few = SMCParams(n_particles=16, max_tokens=3)
    one = base.smc([1, 2], few, twist.guide(Count()))
    two = base.smc([1, 2], few, Count(), twist=tmp_path / "twist")
    np.testing.assert_allclose(one.log_weights, two.log_weights, atol=1e-4)


class Count(Potential):
    """log φ = 1.5 × number of tokens below 3."""

    def complete(self, state):
        return 1.5 * ((state.tokens >= 0) & (state.tokens < 3)).sum(1).double()


def test_rejection_is_exact():
    """Accepted sequences follow σ: counts within 4.5 standard errors."""
    got = evaluate.rejection(engine(), [0], SMCParams(n_particles=4096, max_tokens=T), Phi(), 600)
    assert len(got) == 600
    for s, log_p in SEQUENCES.items():
        p = math.exp(log_p + log_phi(s) - LOG_Z)
        if p > 0.02:
            count = sum(tuple(g) == s for g in got)
            assert abs(count - 600 * p) <= 4.5 * math.sqrt(600 * p * (1 - p)), s
    with pytest.raises(ValueError, match="at most 1"):
        evaluate.rejection(engine(), [0], SMCParams(n_particles=64, max_tokens=T), Count(), 10)
    with pytest.raises(ValueError, match="were kept"):
        evaluate.rejection(engine(), [0], SMCParams(n_particles=64, max_tokens=T), Phi(), 60, max_draws=64)


def test_refusals():
    for bad, why in (
        ({"loss": "no"}, "loss"),
        ({"kind": "no"}, "kind"),
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"loss": "sixo", "samples": "twisted"}, "samples"),
        ({"compose": True}, "compose"),
        ({"kind": "model"}, "trunk"),
        ({"eval_runs": 1}, "eval_runs"),
    ):
        with pytest.raises(ValueError, match=why):
            TwistConfig(**bad)
    with pytest.raises(ValueError, match="exact"):
        Trainer(engine(), [0], PARAMS, Phi(), TwistConfig(positives="data"))
    with pytest.raises(ValueError, match="φ must be a probability"):
        Trainer(engine(), [0], PARAMS, Count(), TwistConfig(loss="fudge", kind="linear")).run()

    class Hard(Potential):
        def complete(self, state):
            return torch.where(state.tokens[:, 0] == 0, 0.0, -math.inf)

    with pytest.raises(ValueError, match="floor"):
        Trainer(engine(), [0], PARAMS, Hard(), TwistConfig(loss="rl", kind="linear")).run()
