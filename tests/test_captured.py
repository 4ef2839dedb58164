"""The captured step: on the CPU one by one, on a GPU as a CUDA graph that is replayed. In both cases against `Group`
over the same model, against enumeration, and against Hugging Face."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backends import INTERPRETED
from paged import PagedLlama, SlotRows
from tiny import PROMPT, TinyLlama, hf_log_probs, make_llama, value_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsmc import Masked, Potential, SMCParams
from fastsmc.params import RESAMPLING_SCHEMES
from fastsmc.potentials import Lexicon
from fastsmc.smc import Group, SMCError
from fastsmc.smc.captured import CapturedGroup
from fastsmc.smc.driving import run_group as run_over

VOCAB, STEPS, STOP, BLOCK = 6, 4, 5, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


class Values(Potential):
    """φ(s) = exp(Σ_t value[t, s_t]) with ψ_t = exp(share · what φ has so far), in tensor operations only."""

    capturable = True

    def __init__(self, value, share=0.6, device="cpu", without=()):
        self.value, self.share, self.without = torch.tensor(value, device=device), share, without

    def log_phi(self, sequence):
        return float(sum(self.value[t, v] for t, v in enumerate(sequence)))

    def _so_far(self, state):
        tokens = state.tokens
        values = self.value[: tokens.shape[1]].T[
            tokens.clamp(min=0), torch.arange(tokens.shape[1], device=tokens.device)
        ]
        return torch.where(tokens >= 0, values, 0.0).sum(1)

    def prefix(self, state):
        return self.share * self._so_far(state)

    def complete(self, state):
        return self._so_far(state)

    def logw_next(self, state):
        step = torch.as_tensor(state.step, device=self.value.device).clamp(max=len(self.value) - 1)
        return (self.share * self.value.index_select(0, step[None])).expand(len(state.finished), -1)


class Guide(Values):
    """As Values, but that what shapes the proposal is no target."""

    proposal_only = True

    def prefix(self, state):
        return 0.0 * self._so_far(state)


class NextOnly(Potential):
    """As Values, but unfinished sequences are scored by logw_next alone."""

    capturable = True
    __init__, log_phi, _so_far = Values.__init__, Values.log_phi, Values._so_far
    complete, logw_next = Values.complete, Values.logw_next


class MaskedNext(NextOnly):
    """As NextOnly, where a token may be followed by three others."""

    def __init__(self, value, device="cpu"):
        super().__init__(value, device=device)
        self.bits = torch.tensor([[0b111000], [0b101100], [0b100011]], dtype=torch.int32, device=device)
        self.allowed = (self.bits >> torch.arange(VOCAB, device=device)) & 1 != 0

    def _rows(self, state):
        return state.lengths % 3

    def complete(self, state):
        tokens = state.tokens
        rows = torch.arange(tokens.shape[1], device=tokens.device) % 3
        wrong = (tokens >= 0) & ~self.allowed[rows, tokens.clamp(min=0)]
        return torch.where(wrong.any(1), -math.inf, self._so_far(state))

    def logw_next(self, state):
        return Masked(self.bits, self._rows(state), super().logw_next(state))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are so small that threads only wait for each other, for long where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"), VOCAB)


@pytest.fixture(scope="module")
def tiny(path):
    return TinyLlama(path, VOCAB, STEPS, frozenset([STOP]))


def run_captured(
    path, params, potential, prompt=PROMPT, device="cpu", pool=None, block=BLOCK, stop=(STOP,), attends=False
):
    own = params.n_particles * ((len(prompt) + params.max_tokens) // block + 1)
    model = PagedLlama(path, len(prompt) + own, block, device, attends)
    blocks = model.prefill(prompt)
    ids = torch.arange(len(blocks), len(blocks) + own, dtype=torch.int32, device=device)[:pool]
    return CapturedGroup(params, model, potential, prompt, blocks, ids, frozenset(stop)).run()


def run_group(path, params, potential, prompt=PROMPT, device="cpu", stop=(STOP,)):
    model = PagedLlama(path, params.n_particles * (len(prompt) + params.max_tokens), 1, device)
    rows = SlotRows(model, prompt, params.n_particles, params.max_tokens)
    return run_over(Group(params, potential, prompt, frozenset(stop), device), rows)


def assert_same(a, b):
    assert a.token_ids == b.token_ids
    np.testing.assert_array_equal(a.ancestors, b.ancestors)
    np.testing.assert_array_equal(a.resampled, b.resampled)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    for name in ("log_weights", "log_probs", "ess", "step_log_weights"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5, err_msg=name)
    assert a.log_z == pytest.approx(b.log_z, abs=1e-5)


class HostTensors(TorchDispatchMode):
    """Operations that make or take a tensor on the host: on a GPU, copies that it would wait for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs, out))):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize(
    ("potential", "force_stop"),
    [*((name, False) for name in ("values", "next only", "masked", "lexicon", None)), ("masked", True), (None, True)],
)
@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_a_step_asks_the_device_nothing(path, proposal, potential, force_stop):
    """On PyTorch's device without data: reading a number there raises, as does mixing it with another device."""
    device = torch.device("meta")
    model = PagedLlama(path, 64, BLOCK, device)
    if potential == "lexicon":
        potential = Lexicon(token_ids=[0, 2], weight=-math.inf)
        potential.setup(SimpleNamespace(vocab_size=VOCAB, device=device, tokenizer=None))
    elif potential is not None:
        potential = {"values": Values, "next only": NextOnly, "masked": MaskedNext}[potential](
            value_table(STEPS, VOCAB), device=device
        )
    params = SMCParams(
        n_particles=5, max_tokens=4 * BLOCK, ess_threshold=0.7, proposal=proposal, force_stop=force_stop,
        power=2.0 if force_stop else 1.0, power_ramp=6,
        resample_every=2, resampling_temperature="entropic",
    )  # fmt: skip
    blocks = list(range(-(-len(PROMPT) // BLOCK)))
    pool = torch.arange(len(blocks), 64, dtype=torch.int32, device=device)
    group = CapturedGroup(params, model, potential, PROMPT, blocks, pool, frozenset([STOP]))
    if force_stop:  # at the first step, before anything is captured, stop tokens become a mask
        group.advance()
    with HostTensors() as host:
        for _ in range(params.max_tokens - group.t):
            group.advance()
    assert not host.seen
    with pytest.raises(RuntimeError, match="meta"):
        group.population()


#: resampling of groups of so many particles
TEMPERED = {1: {}, 7: dict(resampling_temperature="entropic"), 64: dict(resampling_temperature=2.0, resample_every=2)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_equals_the_group(path, scheme, threshold, proposal, device):
    """A group asks the model for distinct histories, with a host in the loop; the particles are the same."""
    powers = (dict(), dict(power=2.0), dict(power=0.5, power_ramp=6))
    for seed, (n, steps, force) in enumerate(((1, 4, False), (7, 9, True), (64, 12, False))):
        params = SMCParams(
            n_particles=n, max_tokens=steps, ess_threshold=threshold, resampling=scheme, proposal=proposal,
            stop_token_ids=[STOP], seed=seed, force_stop=force, **powers[seed], **TEMPERED[n],
        )  # fmt: skip
        # each kind with each size, scheme, threshold and proposal, but not all at once
        at = seed + RESAMPLING_SCHEMES.index(scheme) + (proposal == "base") + int(2 * threshold)
        potential = (Values, NextOnly, MaskedNext)[at % 3](value_table(steps, VOCAB), device=device)
        assert_same(
            run_captured(path, params, potential, device=device), run_group(path, params, potential, device=device)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_a_proposal_only_potential_equals_the_group(path, threshold, device):
    for force in (False, True):
        params = SMCParams(
            n_particles=9, max_tokens=6, ess_threshold=threshold, stop_token_ids=[STOP], seed=2, force_stop=force
        )
        potential = Guide(value_table(6, VOCAB), device=device)
        assert_same(*(run(path, params, potential, device=device) for run in (run_captured, run_group)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 8])
def test_log_probs_equal_hugging_face(path, prompt_len, device):
    """Across block boundaries, with every resampling moving tails; without a stop token, so that all 40 steps run."""
    prompt = [1, 3, 2, 5, 4, 0, 1, 2][:prompt_len]
    params = SMCParams(n_particles=32, max_tokens=40, ess_threshold=1.0, seed=3, temperature=0.8)
    potential = Values(value_table(40, VOCAB) * 3, device=device)
    population = run_captured(path, params, potential, prompt, device, stop=())
    assert population.resampled.sum() == 39 and population.T == 40
    want = hf_log_probs(path, prompt, population.token_ids, 0.8)
    np.testing.assert_allclose(population.token_log_probs, np.array(want), atol=2e-5)


@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_unbiased(path, tiny, proposal):
    """E[Ẑ] = Z by enumeration."""
    potential = Values(value_table(STEPS, VOCAB))
    z = []
    for seed in range(150):
        params = SMCParams(
            n_particles=6, max_tokens=STEPS, ess_threshold=0.8, proposal=proposal, stop_token_ids=[STOP], seed=seed
        )
        z.append(math.exp(run_captured(path, params, potential).log_z))
    error = np.std(z, ddof=1) / math.sqrt(len(z))
    assert abs(np.mean(z) - math.exp(tiny.log_z(potential.log_phi))) < 4 * error


def test_lexicon_and_no_potential(path):
    params = SMCParams(n_particles=20, max_tokens=9, ess_threshold=0.5, stop_token_ids=[STOP], seed=4)
    plain = run_captured(path, params, None)
    assert_same(plain, run_group(path, params, None))
    assert plain.log_z == 0.0
    forced = dataclasses.replace(params, force_stop=True)
    plain = run_captured(path, forced, None)
    assert_same(plain, run_group(path, forced, None))
    assert plain.log_z < 0 and set(plain.finish_reasons) == {"stop"} and max(map(len, plain.token_ids)) == 9
    powered = dataclasses.replace(params, power=2.0, power_ramp=4)
    plain = run_captured(path, powered, None)
    assert_same(plain, run_group(path, powered, None))
    assert plain.log_z != 0.0 and plain.resampled.any()
    lexicon = Lexicon(token_ids=[2, 3], weight=1.5)

    class Engine:
        tokenizer, device, vocab_size = None, torch.device("cpu"), VOCAB

    lexicon.setup(Engine())
    assert_same(run_captured(path, params, lexicon), run_group(path, params, lexicon))
    both = lexicon * Values(value_table(9, VOCAB))
    assert both.capturable
    assert_same(run_captured(path, params, both), run_group(path, params, both))


def test_no_weight_left(path):
    """φ = 0 everywhere, found out at the start, at a step, at the end: log Ẑ = −inf and nothing breaks."""
    for at in (0, 2, STEPS - 1):
        value = np.zeros((STEPS, VOCAB))
        value[at] = -math.inf
        for proposal in ("twisted", "base"):
            params = SMCParams(n_particles=5, max_tokens=STEPS, proposal=proposal, ess_threshold=1.0, seed=1)
            potential = Values(value)
            a, b = run_captured(path, params, potential, stop=()), run_group(path, params, potential, stop=())
            assert a.log_z == b.log_z == -math.inf and a.T == b.T
            np.testing.assert_allclose(a.ess, b.ess, rtol=1e-5)  # a forward of fewer rows rounds otherwise
            np.testing.assert_array_equal(a.tokens, b.tokens)

    class Nothing(Values):
        def prefix(self, state):
            return torch.full_like(state.lengths, -math.inf, dtype=torch.float64)

    params = SMCParams(n_particles=5, max_tokens=STEPS)
    a = run_captured(path, params, Nothing(value_table(STEPS, VOCAB)))
    b = run_group(path, params, Nothing(value_table(STEPS, VOCAB)))
    assert a.log_z == b.log_z == -math.inf and a.T == b.T == 1


def test_resampling_saves_blocks_and_a_dry_pool_is_an_error(path):
    """40 tokens need 12 blocks of 4 a particle when nothing is shared; with a resampling at every step, 7 will do."""
    params = SMCParams(n_particles=64, max_tokens=40, ess_threshold=1.0, seed=5)
    potential = Values(value_table(40, VOCAB) * 3)
    shared = run_captured(path, params, potential, pool=64 * 7, stop=())
    assert_same(shared, run_captured(path, params, potential, stop=()))
    with pytest.raises(SMCError, match=r"pool: its 66 blocks were not enough at step \d+"):
        run_captured(path, params, potential, pool=66, stop=())


@pytest.mark.parametrize("prompt_len", [4, 5])
def test_blocks_that_come_as_they_are_missing(path, prompt_len):
    """From N blocks on, with grants where a column opens; the same particles. Nobody writes to the prompt's blocks."""
    prompt, potential = PROMPT[:prompt_len], Values(value_table(30, VOCAB) * 3)
    params = SMCParams(n_particles=8, max_tokens=30, ess_threshold=0.8, stop_token_ids=[STOP], seed=5)
    model = PagedLlama(path, 200, BLOCK)
    blocks = model.prefill(prompt)
    before, fresh = [cache[blocks].clone() for cache in model.caches], iter(range(len(blocks), 200))
    pool = torch.tensor([next(fresh) for _ in range(8)], dtype=torch.int32)
    group = CapturedGroup(params, model, potential, prompt, blocks, pool, frozenset([STOP]))
    granted = 0
    while not group.done:
        if group.must_open and (missing := group.missing()):
            group.grant([next(fresh) for _ in range(missing)])
            granted += missing
            assert group.missing() == 0
        group.advance()
        group.look()
    assert 0 < granted < 8 * 7 and group.error is None and group.t <= 30
    assert_same(group.population(), run_captured(path, params, potential, prompt))
    for cache, old in zip(model.caches, before, strict=True):
        assert torch.equal(cache[blocks].nan_to_num(), old.nan_to_num())
    with pytest.raises(ValueError, match="advance: all"):
        group.advance()


@pytest.mark.parametrize("method", ["prefix", "complete", "logw_next"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_are_named(path, method, value):
    class Bad(Values):
        pass

    def answer(self, state):
        good = getattr(Values, method)(self, state).clone()
        at = torch.as_tensor(state.step) == 2
        good[3] = torch.where(at, torch.tensor(value, dtype=good.dtype), good[3])
        return good

    setattr(Bad, method, answer)
    proposal = "base" if method == "prefix" else "twisted"
    steps = 2 if method == "complete" else 5
    params = SMCParams(n_particles=6, max_tokens=steps, proposal=proposal, seed=0)
    got = r"NaN or \+inf" if method == "logw_next" else str(value)
    with pytest.raises(SMCError, match=rf"Bad.{method} at step 2: particle 3 got {got}; must be finite or -inf"):
        run_captured(path, params, Bad(value_table(5, VOCAB)), stop=())


def test_refusals(path):
    params = SMCParams(n_particles=4, max_tokens=3)
    model = PagedLlama(path, 40, BLOCK)
    pool = torch.arange(2, 40, dtype=torch.int32)
    stopping = type("Stopping", (Values,), {"stop": lambda self, state: state.finished})(value_table(3, VOCAB))
    for asked, potential, message in (
        (params, Potential(), "potential=Potential: is not capturable"),
        (params, stopping, "potential=Stopping: has `stop`"),
        (dataclasses.replace(params, stop="a"), None, r"params.stop=\['a'\]"),
        (dataclasses.replace(params, top_k=3), None, "params=.*top_k=3.*only the temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            CapturedGroup(asked, model, potential, PROMPT, [0, 1], pool)
    with pytest.raises(ValueError, match="prompt_blocks: 1 for 5 tokens in blocks of 4"):
        CapturedGroup(params, model, None, PROMPT, [0], pool)
    with pytest.raises(ValueError, match="pool: must be a vector of int32"):
        CapturedGroup(params, model, None, PROMPT, [0, 1], pool.long())
    group = CapturedGroup(params, model, None, PROMPT, model.prefill(PROMPT), pool)
    with pytest.raises(ValueError, match="capture: needs a CUDA device"):
        group.capture()
    group.run()
    with pytest.raises(ValueError, match="advance: all 3 steps of max_tokens=3 are done"):
        group.advance()


# --------------------------------------------------------------------------------------------- attend in the step
@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("prompt_len", [3, 8])
def test_attend_in_the_step(path, prompt_len, threshold):
    """Its plan and its kernels are of the step, as tables and lengths of the device change; without a graph, and on a
    GPU with one. The same particles as with attention that gathers, and log-probs of Hugging Face."""
    device, prompt = "cpu" if INTERPRETED else "cuda", [1, 3, 2, 5, 4, 0, 1, 2][:prompt_len]
    params = SMCParams(n_particles=6, max_tokens=11, ess_threshold=threshold, seed=4)
    potential = Values(value_table(11, VOCAB) * 3, device=device)
    ours = run_captured(path, params, potential, prompt, device, stop=(), attends=True)
    assert_same(ours, run_captured(path, params, potential, prompt, device, stop=()))
    assert ours.resampled.any() == (threshold > 0)
    want = hf_log_probs(path, prompt, ours.token_ids)
    np.testing.assert_allclose(ours.token_log_probs, np.array(want), atol=2e-5)


ASKING = ("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")


class NoAnswer(TorchDispatchMode):
    """Refuses what turns a tensor of a device into a number or a shape of the host."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in ASKING:
            raise AssertionError(f"{op} waits for the device")
        return op(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU its own synchronisation check does it")
def test_attend_asks_the_device_nothing(path):
    """A graph replays what was launched; numbers of the host would be those of the capture."""
    model = PagedLlama(path, 40, BLOCK, attends=True)
    table, position = torch.arange(8, dtype=torch.int32).view(4, 2), torch.tensor(5)
    with torch.inference_mode(), NoAnswer():
        for _ in range(2):  # the same call for another position
            model.forward(torch.arange(4), position, table)
            position += 1
        with pytest.raises(AssertionError, match="waits for the device"):
            int(position)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this is the process with it, or there is a GPU")
def test_on_the_interpreter():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        *["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", "attend"],
        __file__,
    ]
    ran = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"on the interpreter:\n{ran.stdout}\n{ran.stderr}"
    assert " passed" in ran.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_graph_replays_without_synchronisation(path, proposal, attends):
    """100 replays of one graph, each with random numbers of its own, and no step that waits for the device."""
    steps, n = 102, 256
    params = SMCParams(n_particles=n, max_tokens=steps, ess_threshold=0.9, proposal=proposal, seed=7)
    potential = Values(value_table(steps, VOCAB), device="cuda")
    model = PagedLlama(path, n * 30, BLOCK, "cuda", attends)
    pool = torch.arange(2, n * 30, dtype=torch.int32, device="cuda")
    group = CapturedGroup(params, model, potential, PROMPT, model.prefill(PROMPT), pool)
    group.advance(), group.advance()
    group.capture()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            group.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    population = group.population()
    assert_same(population, run_group(path, params, potential, device="cuda", stop=()))
    assert population.resampled.sum() > 10
    assert len({tuple(row) for row in population.tokens}) == steps
