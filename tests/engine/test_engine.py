"""The particle runner inside vLLM: exact log-probs, paging, neighbours, ends of every kind."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableTwist, hf_log_probs, value_table
from vllm import SamplingParams

from fastsmc import Potential, SMCError, SMCParams, evaluate
from fastsmc.potentials import Infill
from fastsmc.vllm.passes import Pass

from .conftest import VOCAB

POTENTIAL = TableTwist(3 * value_table(100, VOCAB))
#: multinomial moves rows even when the weights are nearly equal
EVERY_STEP = SMCParams(n_particles=16, max_tokens=72, ess_threshold=1.0, resampling="multinomial", seed=3)


def same(a, b):
    """Two populations are the same, up to float32 rounding of the weights."""
    assert a.token_ids == b.token_ids
    assert np.array_equal(a.ancestors, b.ancestors) and np.array_equal(a.resampled, b.resampled)
    assert np.allclose(a.log_weights, b.log_weights, atol=1e-4)
    assert np.allclose(a.log_probs, b.log_probs, atol=1e-4)


def check_log_probs(path, prompt, population, temperature=1.0):
    for i, want in enumerate(hf_log_probs(path, prompt, population.token_ids, temperature)):
        got = population.token_log_probs[i][: len(want)]
        assert np.abs(got - want).max() <= 5e-4


def prompt_of(length, shift=0):
    return [(3 * i + i // 7 + shift) % VOCAB for i in range(length)]


# ------------------------------------------------------------------------------------------------ exact log-probs
@pytest.mark.parametrize("length", [1, 25, 31, 32, 33, 64])
def test_log_probs_equal_a_full_recompute(engine, tiny_path, all_blocks_back, length):
    """72 steps over several block boundaries, resampling at every step, whatever the prompt's place in its block."""
    prompt = prompt_of(length)
    population = engine.smc(prompt, EVERY_STEP, POTENTIAL)
    assert population.resampled[1:].all() and len(np.unique(population.ancestors[-1])) < 14
    check_log_probs(tiny_path, prompt, population)


def test_base_proposal_and_temperature(engine, tiny_path, all_blocks_back):
    params = SMCParams(n_particles=16, max_tokens=40, ess_threshold=1.0, proposal="base", temperature=0.7)
    population = engine.smc(PROMPT, params, POTENTIAL)
    check_log_probs(tiny_path, PROMPT, population, 0.7)


def test_tempered_resampling_every_few_tokens(engine, tiny_path, all_blocks_back):
    """Both keys of a request arrive; exact samples beside them. log Ẑ of both kinds of runs encloses the truth."""
    params = dataclasses.replace(EVERY_STEP, max_tokens=12, resample_every=5, resampling_temperature="entropic")
    population = engine.smc(PROMPT, params, POTENTIAL)
    assert np.flatnonzero(population.resampled).tolist() == [5, 10]
    check_log_probs(tiny_path, PROMPT, population)
    same(engine.smc(PROMPT, dataclasses.replace(params, resampling_temperature=1.0, resample_every=1), POTENTIAL),
         engine.smc(PROMPT, dataclasses.replace(EVERY_STEP, max_tokens=12), POTENTIAL))  # fmt: skip
    out = evaluate.particle_gibbs(engine, PROMPT, params, POTENTIAL, sweeps=2, chains=3)
    assert out.log_z.shape == (3, 2) and np.isfinite(out.log_z).all() and out.texts is None
    for chain, log_probs in zip(out.token_ids, out.log_probs, strict=True):
        want = [each.sum() for each in hf_log_probs(tiny_path, PROMPT, chain)]
        assert np.allclose(log_probs, want, atol=1e-3)


def test_beside_other_groups_and_ordinary_requests(engine, tiny_path, all_blocks_back):
    """A mixed batch: every group right, the ordinary requests' tokens those that they have alone."""
    ordinary = [
        SamplingParams(max_tokens=50, temperature=1.0, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=60, temperature=0.0),
        SamplingParams(max_tokens=20, temperature=1.0, seed=6, n=3),
    ]
    prompts = [{"prompt_token_ids": prompt_of(40)}, {"prompt_token_ids": PROMPT}, {"prompt_token_ids": prompt_of(70)}]
    alone = engine.generate(prompts, ordinary, use_tqdm=False)
    single = [engine.smc(prompt_of(40), EVERY_STEP, POTENTIAL), engine.smc(PROMPT, EVERY_STEP, POTENTIAL)]
    name = engine.register_potential(POTENTIAL)
    leads = [engine.lead_params(EVERY_STEP, name, return_population=True) for _ in range(2)]
    outputs = engine.generate(
        [prompts[0], prompts[0], prompts[1], prompts[1], prompts[2]],
        [leads[0], ordinary[0], leads[1], ordinary[1], ordinary[2]],
        use_tqdm=False,
    )
    engine.drop_potential(name)
    for a, b in zip([outputs[1], outputs[3], outputs[4]], alone, strict=True):
        assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs]
    for output, want, prompt in zip([outputs[0], outputs[2]], single, [prompt_of(40), PROMPT], strict=True):
        population = engine.population(output)
        same(population, want)
        check_log_probs(tiny_path, prompt, population)
        assert list(output.outputs[0].token_ids) in population.token_ids


def test_early_ends(engine, tiny_path, all_blocks_back):
    """Particles that stop keep their weight, draw no more and leave the forward pass."""
    params = SMCParams(n_particles=32, max_tokens=60, ess_threshold=0.9, stop_token_ids=[5], seed=1)
    population = engine.smc(PROMPT, params, POTENTIAL)
    lengths = [len(t) for t in population.token_ids]
    assert min(lengths) < 30
    for tokens in population.token_ids:
        assert 5 not in tokens[:-1] and (tokens[-1] == 5 or len(tokens) == 60)
    check_log_probs(tiny_path, PROMPT, population)
    rows = population.tokens
    assert (rows[-1] < 0).any() or len(rows) < 60


# --------------------------------------------------------------------------------------------------------- paging
@pytest.mark.parametrize("stop", [None, [5]])
def test_live_blocks_equal_those_of_the_histories(engine, runner, all_blocks_back, monkeypatch, stop):
    """At every step: blocks in use = distinct token histories up to the end of each full block + one tail a slot."""
    seen = []
    original = Pass.take

    def take(part):
        original(part)
        for group, paging, *_ in runner.groups.values():
            size, prompt_len, pairs = paging.block_size, len(group.prompt), set()
            particles, ours = group.cohort.particles, group.cohort.layout.part(group.index)
            histories = group.lineages.tokens()[~particles.finished[ours]].tolist()
            for column in range(prompt_len // size, min(paging.position // size, paging.n_open)):
                pairs |= {(column, tuple(h[: (column + 1) * size - prompt_len])) for h in histories}
            private = max(0, paging.n_open - paging.position // size)
            live = set(paging.live(group.cohort.readers(group.index)).tolist()) - {-1}
            assert len(live) == len(pairs) + private * group.n
            assert live <= paging.owned
            seen.append(len(pairs))

    monkeypatch.setattr(Pass, "take", take)
    for proposal in ("twisted", "base"):
        for threshold in (0.5, 1.0):
            params = SMCParams(
                n_particles=24, max_tokens=100, ess_threshold=threshold, proposal=proposal, stop_token_ids=stop, seed=9
            )
            engine.smc(prompt_of(40), params, POTENTIAL)
    assert max(seen) > (0 if stop else 3)


def test_capacity_is_refused_or_ended_clearly(small_engine):
    """A group that cannot fit is refused before it runs; one that outgrows the cache ends with an error, alone."""
    small = small_engine
    pool = small.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    with pytest.raises(ValueError, match="n_particles=60.*KV blocks"):
        small.smc(PROMPT, SMCParams(n_particles=60, max_tokens=8))
    with pytest.raises(ValueError, match="never resampling"):
        small.smc(PROMPT, SMCParams(n_particles=16, max_tokens=100, ess_threshold=0.0), POTENTIAL)
    with pytest.raises(SMCError, match="KV cache is full"):
        small.smc(PROMPT, SMCParams(n_particles=16, max_tokens=100, ess_threshold=0.01), POTENTIAL)
    assert pool.get_num_free_blocks() == free
    # one of two waits until the other is done
    params = SMCParams(n_particles=12, max_tokens=60, ess_threshold=0.01)
    assert len(small.smc([PROMPT, PROMPT], params, POTENTIAL)) == 2
    # two that both wait for more than there is: the younger ends, the other finishes
    params = SMCParams(n_particles=9, max_tokens=100, ess_threshold=0.01)
    with pytest.raises(SMCError, match="prompt 1: .*KV cache is full") as caught:
        small.smc([PROMPT, PROMPT], params, POTENTIAL)
    assert caught.value.populations[0] is not None and caught.value.populations[1] is None
    assert pool.get_num_free_blocks() == free
    # more groups than rows: they queue
    populations = small.smc([PROMPT] * 9, SMCParams(n_particles=16, max_tokens=8), POTENTIAL)
    assert len(populations) == 9 and pool.get_num_free_blocks() == free


def test_a_lead_gives_way_to_a_prompt_that_came_first(small_engine):
    """The group's tails are reserved before an earlier, longer prompt finds its blocks: neither may wait for ever."""
    pool = small_engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    lead = small_engine.lead_params(SMCParams(n_particles=28, max_tokens=8))
    outputs = small_engine.generate(
        [{"prompt_token_ids": prompt_of(480)}, {"prompt_token_ids": PROMPT}, {"prompt_token_ids": prompt_of(470)}],
        [SamplingParams(max_tokens=8), lead, SamplingParams(max_tokens=8)],
        use_tqdm=False,
    )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8, 8]
    assert pool.get_num_free_blocks() == free


# ----------------------------------------------------------------------------------------------- ends of every kind
def test_abort(engine, scheduler, all_blocks_back):
    """Aborted in the queue, in its prefill and while it runs; others finish."""
    ordinary = engine.enqueue(
        {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=40, temperature=0.0), use_tqdm=False
    )
    core = engine.llm_engine
    for n_steps in (0, 1, 3, 6):
        request_id = str(next(engine.request_counter))
        core.add_request(request_id, engine._prompt(prompt_of(50)), engine.lead_params(EVERY_STEP))
        for _ in range(n_steps):
            core.step()
        core.abort_request([request_id])
    outputs = engine.wait_for_completion(use_tqdm=False)
    assert len(ordinary) == 1 and len(outputs) == 1 and len(outputs[0].outputs[0].token_ids) == 40


@pytest.mark.parametrize("settings", [{}, dict(top_k=6, top_p=0.9, min_tokens=70, logit_bias={2: 1.0})])
def test_reset_restarts_running_groups(engine, scheduler, all_blocks_back, settings):
    """A reset of the prefix cache preempts a running group; it starts again and gives the same population."""
    params = dataclasses.replace(EVERY_STEP, stop_token_ids=[5] if settings else None, **settings)
    want = engine.smc(prompt_of(50), params, POTENTIAL)
    name = engine.register_potential(POTENTIAL)
    request_id = str(next(engine.request_counter))
    lead = engine.lead_params(params, name, return_population=True)
    engine.llm_engine.add_request(request_id, engine._prompt(prompt_of(50)), lead)
    for _ in range(5):
        engine.llm_engine.step()
    assert any(group.started for group in scheduler._groups.values())
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        outputs += engine.llm_engine.step()
    engine.drop_potential(name)
    same(engine.population(outputs[-1]), want)


class Panic(BaseException):
    """As what extensions in Rust raise."""


class Broken(Potential):
    """Fails at step 3 in a way of its own."""

    def __init__(self, how):
        self.how = how

    def prefix(self, state):
        n = len(state.finished)
        scores = torch.zeros(n, dtype=torch.float64)
        if state.step == 3:
            if self.how == "raises":
                raise KeyError("no such key")
            if self.how == "exits":
                raise SystemExit(3)
            if self.how == "panics":
                raise Panic
            if self.how == "interrupts":
                raise KeyboardInterrupt
            if self.how == "nan":
                scores[2] = float("nan")
            if self.how == "+inf":
                scores[1] = float("inf")
            if self.how == "shape":
                return torch.zeros(n + 1)
            if self.how == "list":
                return [0.0] * n
            if self.how == "in place":  # scribbles over what it was given: must not reach the engine
                state.lengths += 100
                state.finished[:] = True
        return scores


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "Broken.prefix at step 3.*KeyError.*no such key"),
        ("exits", "SystemExit"),
        ("panics", "Broken.prefix at step 3: raised Panic"),
        ("nan", "particle 2 got nan"),
        ("+inf", "particle 1 got inf"),
        ("shape", r"returned \(17,\)"),
        ("list", "returned list"),
    ],
)
def test_a_broken_potential_ends_its_own_group_alone(engine, all_blocks_back, how, message):
    good, bad = POTENTIAL, Broken(how)
    with pytest.raises(SMCError, match=message) as caught:
        engine.smc([PROMPT, PROMPT, prompt_of(9)], EVERY_STEP, [good, bad, good])
    first, second, third = caught.value.populations
    assert second is None
    same(first, engine.smc(PROMPT, EVERY_STEP, good))
    assert third.n_particles == 16


def test_an_interrupt_stops_the_run_at_once(engine, all_blocks_back):
    with pytest.raises(KeyboardInterrupt):
        engine.smc([PROMPT, PROMPT], EVERY_STEP, [POTENTIAL, Broken("interrupts")])
    assert engine.smc(PROMPT, EVERY_STEP).n_particles == 16


class Counts(Potential):
    """log ψ = number of even tokens, in a tensor that `setup` made and that is updated in place."""

    def setup(self, engine):
        self.count = torch.zeros(64, dtype=torch.float64, device=engine.device)

    def reset(self, n_particles, prompt):
        self.n = n_particles
        self.count.zero_()

    def reindex(self, ancestors):
        self.count[: self.n] = self.count[: self.n][ancestors]

    def prefix(self, state):
        if state.last_tokens is not None:
            self.count[: self.n] += (state.last_tokens >= 0) & (state.last_tokens % 2 == 0)
        return self.count[: self.n].clone()


def test_groups_side_by_side_share_no_state(engine, all_blocks_back):
    """A potential for two prompts gives each what it gives alone; an iterator in it is refused before anything runs."""
    potential, params = Counts(), [SMCParams(n_particles=16, max_tokens=20, group=g) for g in range(2)]
    alone = [engine.smc(PROMPT, p, Counts()).log_z for p in params]
    assert np.allclose([p.log_z for p in engine.smc([PROMPT, PROMPT], params[0], potential)], alone, atol=1e-4)
    assert np.allclose(engine.smc(PROMPT, params[1], potential).log_z, alone[1], atol=1e-4)
    potential.ids = iter([1])
    with pytest.raises(SMCError, match="Counts.ids: is a list_iterator"):
        engine.smc(PROMPT, params[0], potential)


def test_scribbling_on_the_state_is_harmless(engine, all_blocks_back):
    params = SMCParams(n_particles=16, max_tokens=10)
    same(engine.smc(PROMPT, params, Broken("in place")), engine.smc(PROMPT, params, Broken("nothing")))


class BrokenTwist(TableTwist):
    asked = 0  # since it broke

    def __init__(self, how):
        super().__init__(value_table(100, VOCAB))
        self.how = how

    def setup(self, engine):
        if self.how == "setup":
            raise OSError("no such file")

    def logw_next(self, state):
        n = len(state.finished)
        if state.step < 2:
            return super().logw_next(state)
        BrokenTwist.asked += 1
        bad = torch.zeros((n, VOCAB))
        if self.how == "nan":
            bad[4, 1] = float("nan")
        if self.how == "shape":
            bad = bad[:, 1:]
        if self.how == "int":
            bad = bad.long()
        if self.how == "none":
            return None
        return bad


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("setup", "BrokenTwist.setup.*no such file"),
        ("nan", "logw_next at step 2: particle 4"),
        ("shape", r"returned \(16, 7\)"),
        ("int", "int64"),
        ("none", "returned None after"),
    ],
)
def test_a_broken_twist(engine, all_blocks_back, how, message):
    BrokenTwist.asked = 0
    with pytest.raises(SMCError, match=message):
        engine.smc(PROMPT, EVERY_STEP, BrokenTwist(how))
    assert BrokenTwist.asked == (how != "setup")


class Impossible(Potential):
    """Every sequence has weight zero from step `start` on."""

    def __init__(self, start=4):
        self.start = start

    def prefix(self, state):
        worth = 0.0 if state.step < self.start else -float("inf")
        return torch.full((len(state.finished),), worth, dtype=torch.float64)


def test_no_weight_left(engine, all_blocks_back):
    """log Z = −inf, ESS 0, no NaN, no crash; a client that wanted a sample gets an error."""
    population = engine.smc(PROMPT, EVERY_STEP, Impossible())
    assert population.log_z == -np.inf and population.degenerate and population.ess[-1] == 0.0
    assert not np.isnan(population.log_weights).any() and not np.isnan(population.weights).any()
    with pytest.raises(ValueError):
        population.sample(1)
    for start in (0, 72):  # the empty sequence already; only the end
        population = engine.smc(PROMPT, EVERY_STEP, Impossible(start))
        assert population.log_z == -np.inf and population.ess[-1] == 0.0 and population.final_ess == 0.0
    name = engine.register_potential(Impossible())
    output = engine.generate({"prompt_token_ids": PROMPT}, engine.lead_params(EVERY_STEP, name), use_tqdm=False)[0]
    engine.drop_potential(name)
    assert output.outputs[0].finish_reason == "error"
    assert "weight zero" in output.kv_transfer_params["smc"]["error"]


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n=2), "n=2"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(logprobs=1), "logprobs=1"),
        (dict(presence_penalty=0.5), "presence_penalty=0.5"),
        (dict(repetition_penalty=1.1), "repetition_penalty=1.1"),
        (dict(stop=["x"]), "stop=.*tokenizer"),
        (dict(stop=["x"], skip_special_tokens=False), "skip_special_tokens=False"),
        (dict(stop=["x"], extra_args={"smc_n_particles": 4, "smc_exact": [[1]]}), r"smc_exact: .*stop=\['x'\]"),
        (dict(ignore_eos=True, extra_args={"smc_n_particles": 4, "smc_force_stop": True}), "force_stop=True"),
        (dict(extra_args={"smc_n_particles": 4, "smc_force_stop": 3}), "force_stop=3"),
        (dict(extra_args={"smc_n_particles": 0}), "n_particles=0"),
        (dict(extra_args={"smc_n_particles": 5000}), "n_particles=5000.*max_num_seqs"),
        (dict(extra_args={"smc_n_particles": 4, "smc_sampler": "x"}), "smc_sampler"),
        (dict(extra_args={"smc_resampling": "systematic"}), "smc_n_particles: is missing"),
        (dict(extra_args={"smc_n_particles": 4, "smc_resampling": "best"}), "resampling='best'"),
        (dict(extra_args={"smc_n_particles": 4, "smc_potential": "nobody"}), "nobody"),
        (dict(extra_args={"smc_n_particles": 4, "smc_potential_args": "["}), "smc_potential_args"),
        (dict(extra_args={"smc_n_particles": 4, "smc_potential_args": "[" * 100_000}), "smc_potential_args"),
        (dict(extra_args={"smc_n_particles": 4, "smc_potential": "object:x:-1000"}), "register_potential"),
        (dict(extra_args={"smc_n_particles": 4, "smc_return_population": "no"}), "smc_return_population"),
        (dict(extra_args={"smc_n_particles": [4]}), "n_particles="),
        (dict(extra_args={"smc_n_particles": 4, "smc_ess_threshold": None}), "ess_threshold=None"),
        (dict(extra_args={"smc_n_particles": 4, "smc_resampling": ["ssp"]}), "resampling="),
        (dict(extra_args={"smc_n_particles": 4, "smc_resampling_temperature": 0.5}), "resampling_temperature=0.5"),
        (dict(extra_args={"smc_n_particles": 4, "smc_resample_every": 0}), "resample_every=0"),
        (dict(max_tokens=5000), "max_model_len"),
    ],
)
def test_bad_leads_are_refused(engine, all_blocks_back, change, message):
    """By the user face with a ValueError; by the scheduler, as HTTP clients meet it, with an error and no harm."""
    import re

    params = SamplingParams(**{**dict(max_tokens=8, extra_args={"smc_n_particles": 4}), **change})
    core = engine.llm_engine
    request_id = str(next(engine.request_counter))
    if "n" not in change:  # vLLM itself splits n > 1 into several requests
        core.add_request(request_id, engine._prompt(PROMPT), params)
        outputs = []
        while core.has_unfinished_requests():
            outputs += core.step()
        final = outputs[-1]
        assert final.outputs[0].finish_reason == "error"
        assert re.search(message, final.kv_transfer_params["smc"]["error"])
    with pytest.raises(ValueError, match=message):
        engine.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)


def test_bad_arguments_of_smc(engine, all_blocks_back):
    with pytest.raises(ValueError, match="prompt=''|no tokenizer"):
        engine.smc("")
    with pytest.raises(ValueError, match="token id"):
        engine.smc([[]])
    assert engine.smc([]) == []
    params = SMCParams(n_particles=2, max_tokens=2)
    for prompt in ({"prompt_token_ids": PROMPT}, {"input_ids": PROMPT}, np.array(PROMPT), tuple(PROMPT)):
        assert engine.smc(prompt, params).prompt_token_ids == PROMPT
    with pytest.raises(ValueError, match=r"prompts\[1\].*'prompt_embeds'"):
        engine.smc([PROMPT, {"prompt_embeds": torch.zeros(2, 64)}])
    with pytest.raises(ValueError, match="exact"):
        engine.smc(PROMPT, SMCParams(), exact=[5, 6])
    with pytest.raises(ValueError, match="vocabulary"):
        engine.smc([PROMPT, [VOCAB]])
    with pytest.raises(ValueError, match="stop_token_ids.*vocabulary"):
        engine.smc(PROMPT, SMCParams(stop_token_ids=[VOCAB]))
    with pytest.raises(SMCError, match="Infill.*vocabulary"):
        engine.smc(PROMPT, SMCParams(), Infill([VOCAB]))
    with pytest.raises(ValueError, match="params="):
        engine.smc(PROMPT, {"n_particles": 3})
    with pytest.raises(ValueError, match="an instance"):
        engine.smc(PROMPT, SMCParams(), TableTwist)
    with pytest.raises(ValueError, match="1 potentials for 2 prompts"):
        engine.smc([PROMPT, PROMPT], SMCParams(), [POTENTIAL])
    with pytest.raises(ValueError, match="max_num_seqs"):
        engine.smc(PROMPT, SMCParams(n_particles=2000))


# ------------------------------------------------------------------------------------------ hidden states and scores
class Looks(TableTwist):
    """Remembers how far `state.hidden` is from the hidden states of a full recompute, in each method."""

    worst = 0.0

    def setup(self, engine):
        from transformers import AutoModelForCausalLM

        assert engine.hidden_size == 64 and engine.vocab_size == VOCAB and engine.tokenizer is None
        self.trunk = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).model.eval()

    def _look(self, state, length, asked):
        for i in torch.nonzero(asked).squeeze(1).tolist():
            ids = torch.tensor([state.prompt + state.tokens[i, :length].tolist()])
            error = (self.trunk(ids).last_hidden_state[0, -1] - state.hidden[i].cpu()).abs().max()
            Looks.worst = max(Looks.worst, float(error))

    def prefix(self, state):
        if state.step:
            self._look(state, state.step - 1, ~state.finished)
        return super().prefix(state)

    def complete(self, state):
        self._look(state, state.step - 1, state.finished & (state.lengths == state.step))
        return super().complete(state)

    def logw_next(self, state):
        self._look(state, state.step, ~state.finished)
        return super().logw_next(state)


@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_hidden_states_belong_to_their_particles(engine, tiny_path, all_blocks_back, proposal):
    potential, Looks.worst = Looks(3 * value_table(100, VOCAB)), 0.0
    potential.path = tiny_path
    params = SMCParams(
        n_particles=12,
        max_tokens=12,
        ess_threshold=1.0,
        proposal=proposal,
        stop_token_ids=[5],
        resampling="multinomial",
    )
    engine.smc(PROMPT, params, potential)
    assert 0.0 < Looks.worst < 1e-3


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("continuation", [[2], [1, 4, 6], list(range(8)) * 5])
def test_infilling_scores_equal_a_full_recompute(engine, tiny_path, all_blocks_back, continuation, every_step):
    """φ = p0(continuation | s) by the engine's own KV cache; the final weights are φ itself when nothing resamples."""
    params = SMCParams(n_particles=8, max_tokens=30, ess_threshold=0.0, stop_token_ids=[5], seed=4, temperature=0.8)
    prompt = prompt_of(20)
    population = engine.smc(prompt, params, Infill(continuation, every_step=every_step))
    check_log_probs(tiny_path, prompt, population, 0.8)
    whole = [tokens + continuation for tokens in population.token_ids]
    for i, scores in enumerate(hf_log_probs(tiny_path, prompt, whole, 0.8)):
        assert abs(scores[-len(continuation) :].sum() - population.log_weights[i]) <= 5e-4 * len(continuation)
    if every_step:  # the twist of every prefix, around the block boundary too
        for t in range(8, 16):
            going = [i for i in range(8) if len(population.token_ids[i]) > t + 1]
            whole = [population.token_ids[i][: t + 1] + continuation for i in going]
            for i, scores in zip(going, hf_log_probs(tiny_path, prompt, whole, 0.8), strict=True):
                got = population.step_log_weights[t, i]
                assert abs(scores[-len(continuation) :].sum() - got) <= 5e-4 * len(continuation)
    resampled = SMCParams(n_particles=8, max_tokens=30, ess_threshold=1.0, stop_token_ids=[5], seed=4, temperature=0.8)
    population = engine.smc(prompt, resampled, Infill(continuation, every_step=every_step))
    check_log_probs(tiny_path, prompt, population, 0.8)
