"""Learned twists as potentials: what they give, in every mode, against a direct recompute; files and refusals."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableTwist, TinyLlama, hf_log_probs, make_llama, value_table
from torch.nn import functional as F

from fastsmc import SMCParams
from fastsmc.hf import HFEngine, Trunk
from fastsmc.smc import SMCError
from fastsmc.twists import Card, Head, LoraLinear, Twist, add_lora, card_potential, tokenizer_hash

VOCAB, STEPS, STOP = 8, 3, 5
PHI = TableTwist(np.where(np.isinf(v := value_table(STEPS, VOCAB)), -1.0, v))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("base"), VOCAB)


@pytest.fixture(scope="module")
def small_path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("small"), VOCAB, seed=5)


@pytest.fixture(scope="module")
def hf(path):
    return HFEngine(path, stop_token_ids=[STOP])


@pytest.fixture(scope="module")
def tiny(path):
    return TinyLlama(path, VOCAB, STEPS, frozenset([STOP]))


def random_twist(kind, path, small_path=None, loss="ctl", seed=0):
    """A twist with random weights of a spread that matters."""
    torch.manual_seed(seed)
    trunk, extra = None, {}
    if kind == "lora":
        trunk = Trunk.load(path)
        for adapter in add_lora(trunk.model, rank=2, alpha=4.0).values():
            torch.nn.init.normal_(adapter.b, std=0.1)
        extra = {"lora_rank": 2, "lora_alpha": 4.0}
    elif kind == "model":
        trunk = Trunk.load(small_path)
    head = Head(64, VOCAB, None if kind == "linear" else 16)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        spread = head(torch.randn(200, 64)).std()
        head.out *= 0.5 / spread  # tame enough for standard errors to be estimated from 150 runs
        head.bias *= 0.5 / spread
    card = Card(
        kind=kind, loss=loss, base_model=str(path), vocab_size=VOCAB, hidden_size=64, tokenizer=None, input_size=64,
        rank=64 if kind == "linear" else 16, **extra,
    )  # fmt: skip
    return Twist(card, head, trunk)


def direct(twist, base, prompt, tokens):
    """(V,) log ψ of every next token after `tokens`, by a full recompute."""
    trunk = twist.trunk or base
    with torch.no_grad():
        hidden = trunk.hidden(prompt, torch.tensor([[*tokens, 0]]))[0, -1]
        raw = twist.head(hidden)
    return (F.logsigmoid(raw) if twist.card.bounded else raw).double()


class Checked(Twist):
    """Compares what it gives with the direct recompute, at every step."""

    shared_by_groups = ("seen",)

    @classmethod
    def of(cls, twist, base):
        out = cls(twist.card, twist.head, twist.trunk)
        out.base, out.seen = base, []
        return out

    def logw_next(self, state):
        rows = super().logw_next(state)
        for i in range(len(state.lengths)):
            if not state.finished[i]:
                tokens = state.tokens[i].tolist()
                want = direct(self, self.base, state.prompt, tokens)
                if tokens:
                    want = want - direct(self, self.base, state.prompt, tokens[:-1])[tokens[-1]]
                got = rows.values[rows.index[i]].double()
                assert (got - want).abs().max() < 1e-4, (i, state.step)
        self.seen.append(state.step)
        return rows

    def prefix(self, state):
        out = super().prefix(state)
        for i in range(len(state.lengths)):
            if state.step and not state.finished[i] and not self.proposal_only:
                tokens = state.tokens[i].tolist()
                assert abs(out[i] - direct(self, self.base, state.prompt, tokens[:-1])[tokens[-1]]) < 1e-4
        self.seen.append(state.step)
        return out


@pytest.mark.parametrize(
    ("proposal", "loss"),
    [("twisted", "ctl"), ("twisted", "fudge"), ("twisted", "dpg"), ("base", "ctl"), ("base", "fudge")],
)
@pytest.mark.parametrize("kind", ["linear", "mlp", "lora", "model"])
def test_values(hf, path, small_path, kind, proposal, loss):
    """Ratios of ψ of each particle's own history, through resampling at every step."""
    twist = Checked.of(random_twist(kind, path, small_path, loss), hf.trunk)
    params = SMCParams(n_particles=9, max_tokens=5, ess_threshold=1.0, proposal=proposal, resampling="multinomial")
    longer = TableTwist(np.zeros((5, VOCAB)))
    population = hf.smc(PROMPT, params, twist * PhiLast(longer.value.numpy()))
    assert max(twist.seen) == 4 and population.resampled[1:4].all()


class PhiLast(TableTwist):
    """φ alone, without twists."""

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)

    def logw_next(self, state):
        return None


@pytest.mark.parametrize("loss", ["ctl", "fudge", "dpg"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_unbiased(hf, tiny, path, kind, threshold, loss):
    """Whatever the twist says, E[Ẑ] = Z."""
    phi = PhiLast(PHI.value.numpy())
    params = SMCParams(n_particles=8, max_tokens=STEPS, ess_threshold=threshold)
    populations = hf.smc([PROMPT] * 150, params, random_twist(kind, path, loss=loss) * phi)
    ratio = np.exp([p.log_z - tiny.log_z(phi.log_phi) for p in populations])
    assert abs(ratio.mean() - 1) <= 3.5 * ratio.std(ddof=1) / math.sqrt(len(ratio))
    assert ratio.std() > 0.01  # it does something


def test_a_mask_and_a_twist_compose(hf, tiny, path):
    """log ψ of the factors add up: a mask's zeros hold, and Ẑ is that of the product."""
    value = value_table(STEPS, VOCAB)
    value[0, :4] = -np.inf
    mask = TableTwist(np.where(np.isinf(value), value, 0.0), share=1.0)
    both = PhiLast(PHI.value.numpy())
    populations = hf.smc(
        [PROMPT] * 150, SMCParams(n_particles=8, max_tokens=STEPS), random_twist("mlp", path) * mask * both
    )
    assert all(t[0] >= 4 for p in populations for t in p.token_ids)
    log_z = tiny.log_z(lambda s: mask.log_phi(s) + both.log_phi(s))
    ratio = np.exp([p.log_z - log_z for p in populations])
    assert abs(ratio.mean() - 1) <= 3.5 * ratio.std(ddof=1) / math.sqrt(len(ratio))


@pytest.mark.parametrize("kind", ["linear", "mlp", "lora", "model"])
def test_files(hf, path, small_path, kind, tmp_path):
    """A loaded twist gives the same population as the one that was saved."""
    twist = random_twist(kind, path, small_path)
    twist.save(tmp_path / "twist")
    params = SMCParams(n_particles=6, max_tokens=STEPS, ess_threshold=1.0)
    phi = PhiLast(PHI.value.numpy())
    one, two = hf.smc(PROMPT, params, twist * phi), hf.smc(PROMPT, params, phi, twist=tmp_path / "twist")
    assert one.token_ids == two.token_ids and np.allclose(one.log_weights, two.log_weights, atol=1e-5)
    card = json.loads((tmp_path / "twist" / "card.json").read_text())
    assert card["kind"] == kind and card["loss"] == "ctl" and card["vocab_size"] == VOCAB
    assert (tmp_path / "twist" / "twist.safetensors").is_file()


def test_the_hf_engine_equals_the_table(hf, tiny):
    from tiny import run_table

    for proposal in ("twisted", "base"):
        params = SMCParams(
            n_particles=17, max_tokens=STEPS, ess_threshold=0.9, proposal=proposal, stop_token_ids=[STOP]
        )
        a, b = hf.smc(PROMPT, params, PHI), run_table(tiny, params, PHI)  # both stop at STOP
        assert a.token_ids == b.token_ids and np.allclose(a.log_weights, b.log_weights, atol=1e-4)


def test_continuations_in_the_hf_engine(hf, path):
    from fastsmc.potentials import Infill

    follow = [1, 2, 6]
    params = SMCParams(n_particles=8, max_tokens=4, ess_threshold=1.0, ignore_eos=True, temperature=0.7)
    population = hf.smc(PROMPT, params, Infill(follow, every_step=True))
    assert population.resampled.any()
    scores = hf_log_probs(path, PROMPT, [t + follow for t in population.token_ids], 0.7)
    free = hf.smc(PROMPT, SMCParams(**{**vars(params), "ess_threshold": 0.0}), Infill(follow))
    for tokens, weight in zip(free.token_ids, free.log_weights, strict=True):
        want = hf_log_probs(path, PROMPT, [tokens + follow], 0.7)[0][-3:].sum()
        assert abs(weight - want) < 1e-4
    assert all(np.isfinite(s).all() for s in scores)


def test_frozen_hidden_states(hf):
    """With a KV cache and shared histories the same as by full recompute; one token long too."""
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 7, -1], [0, -1, -1]])
    for part in (tokens, tokens[:, :1]):
        want = hf.trunk.hidden(PROMPT, part)
        torch.testing.assert_close(hf.trunk.frozen_hidden(PROMPT, part), want, atol=1e-5, rtol=1e-5)


def test_lora_starts_as_the_model(path):
    trunk, plain = Trunk.load(path), Trunk.load(path)
    adapters = add_lora(trunk.model, rank=3, alpha=3.0)
    assert adapters and all(isinstance(a, LoraLinear) for a in adapters.values())
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(trunk.hidden(PROMPT, tokens), plain.hidden(PROMPT, tokens))
    assert {n.split(".")[-1] for n, p in trunk.model.named_parameters() if p.requires_grad} == {"a", "b"}


def test_head_scores_and_start():
    head = Head(64, VOCAB, 16)
    hidden, tokens = torch.randn(5, 64), torch.tensor([0, 1, 2, 3, 7])
    assert head(hidden).abs().max() == 0.0
    torch.nn.init.normal_(head.features[-1].weight)
    torch.testing.assert_close(head.score(hidden, tokens), head(hidden)[torch.arange(5), tokens])
    head.start_from(torch.randn(VOCAB, 64))
    assert torch.isfinite(head.out).all()


def test_refusals(hf, path, tmp_path):
    twist = random_twist("mlp", path)
    params = SMCParams(n_particles=4, max_tokens=2)
    for field, value in (("base_model", "other/model"), ("vocab_size", 9), ("hidden_size", 32)):
        other = Twist(Card(**{**vars(twist.card), field: value}), twist.head)
        with pytest.raises(ValueError, match=rf"trained for {field}=.*this engine has"):
            hf.smc(PROMPT, params, other * PHI)
    with pytest.raises(SMCError, match="proposal-only"):
        dpg = random_twist("mlp", path, loss="dpg")
        hf.smc(PROMPT, SMCParams(n_particles=4, max_tokens=2, proposal="base"), dpg * PHI)
    with pytest.raises(SMCError, match="kind 'lora' cannot stand beside a proposal-only one"):
        hf.smc(PROMPT, params, dpg * random_twist("lora", path) * PHI)
    with pytest.raises(ValueError, match=r"card.json"):
        Twist.load(tmp_path)
    twist.save(tmp_path)
    with pytest.raises(ValueError, match="without a name"):
        card_potential(tmp_path)
    (tmp_path / "twist.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=str(tmp_path)):
        Twist.load(tmp_path)
    card = tmp_path / "card.json"
    twist.save(tmp_path)
    whole = card.read_bytes()
    for text in (b"", b"[]", b"3", b'{"a"', b"\xff", b"[" * 100_000, whole.replace(b'"rank": 16', b'"rank": 17')):
        card.write_bytes(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            Twist.load(tmp_path)
    card.write_bytes(whole.replace(b'"vocab_size": 8', b'"vocab_size": 1000000000000'))  # no memory for that
    with pytest.raises(ValueError, match=str(tmp_path)):
        Twist.load(tmp_path)
    card.write_bytes(whole)
    tensors = (tmp_path / "twist.safetensors").read_bytes()
    for i in range(0, len(tensors), 97):
        (tmp_path / "twist.safetensors").write_bytes(tensors[:i])
        with pytest.raises(ValueError, match=str(tmp_path)):
            Twist.load(tmp_path)
    for field, value in (("kind", "none"), ("loss", "none"), ("rank", 0)):
        with pytest.raises(ValueError, match=field):
            Card(**{**vars(twist.card), field: value})


def test_tokenizer_hash():
    class Fake:
        def __init__(self, vocab):
            self.vocab = vocab

        def get_vocab(self):
            return self.vocab

    assert tokenizer_hash(None) is None
    assert tokenizer_hash(Fake({"a": 0, "b": 1})) == tokenizer_hash(Fake({"b": 1, "a": 0}))
    assert tokenizer_hash(Fake({"a": 0, "b": 1})) != tokenizer_hash(Fake({"a": 1, "b": 0}))
