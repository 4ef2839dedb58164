"""Two tensor-parallel ranks: one decides, both hold the same tokens in their KV caches, whatever a potential does."""

import os
import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from intervened import EACH, LISTS, hooked_log_probs, orthonormal, swapped
from safetensors.torch import load as tensors_of
from tiny import PROMPT, TableTwist, hf_log_probs
from vllm import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from fastsmc import Potential, SMCError, SMCParams, ops
from fastsmc.hf import HFEngine
from fastsmc.interventions import Interchange, Steer, Subspace, load
from fastsmc.potentials import Infill
from fastsmc.potentials.waiting import in_background
from fastsmc.vllm.messages import StepOrder
from fastsmc.vllm.passes import Batch
from fastsmc.vllm.ranks import Follower, Leader, LeadingRunner
from fastsmc.vllm.starting import environment

from .conftest import VOCAB, make_engine
from .test_engine import EVERY_STEP, Broken, check_log_probs, prompt_of, same
from .test_modes import PARAMS, POTENTIAL, alone, check  # noqa: F401  `alone` is a fixture
from .test_twist import PHI, params_of, save_twist

GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the workers
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "90",  # ranks that have parted wait for each other: an error, and no more
}


@pytest.fixture(scope="module")
def parallel(tiny_path, named):
    with environment(ENV):
        yield make_engine(
            tiny_path,
            in_process=False,
            env=ENV,
            tensor_parallel_size=2,
            interventions=named,
            max_num_seqs=64,
            num_gpu_blocks_override=161,
            kv_cache_memory_bytes=1 << 26,
        )


def every_block_is_free(engine):
    """A group that needs 151 of the 160 blocks finds them."""
    population = engine.smc(PROMPT, SMCParams(n_particles=50, max_tokens=90, ess_threshold=0.0), POTENTIAL)
    assert [len(tokens) for tokens in population.token_ids] == [90] * 50


@pytest.fixture
def all_blocks_back(request):
    yield
    every_block_is_free(request.getfixturevalue("parallel"))


def test_populations_are_those_of_one_rank(parallel, alone, all_blocks_back):  # noqa: F811
    """Side by side with other groups and ordinary requests too; a group that fails, fails alone."""
    check(parallel, alone)


def test_groups_under_interventions(parallel, tiny_path, named, all_blocks_back):
    """The residual stream is whole on every rank, so all of them map it; the inside of an MLP is not."""
    lists = [LISTS["steer"], LISTS["affine"], None, LISTS["project"], [EACH["steer"], EACH["steer positions"]]]
    prompts = [prompt_of(40 + i) for i in range(5)]
    params = SMCParams(n_particles=6, max_tokens=12, ess_threshold=1.0, seed=3)
    populations = parallel.smc(prompts, params, POTENTIAL, intervention=lists)
    lead = parallel.lead_params(params, intervention="steer", return_population=True)
    [output] = parallel.generate([{"prompt_token_ids": prompts[0]}], lead, use_tqdm=False)
    populations.append(parallel.population(output))
    prompts, lists = [*prompts, prompts[0]], [*lists, load(named["steer"])]
    for population, prompt, parts in zip(populations, prompts, lists, strict=True):
        for i, want in enumerate(hooked_log_probs(tiny_path, prompt, population.token_ids, parts or [])):
            assert np.abs(population.token_log_probs[i] - want).max() <= 5e-4
    with pytest.raises(ValueError, match="RankOne: its site down_proj is sharded with tensor_parallel_size=2"):
        parallel.smc(prompts[0], params, intervention=EACH["rank one"])
    far = torch.full((64,), 3e38)
    with pytest.raises(SMCError, match=r"layer 1 \(block\) put out NaN"):
        parallel.smc(prompts[0], params, intervention=[Steer(0, far, at="generated"), Steer(1, far, at="generated")])
    plain = parallel.smc(prompts, params, POTENTIAL)  # in the blocks that held NaN, on every rank
    for population, prompt in zip(plain, prompts, strict=True):
        for i, want in enumerate(hooked_log_probs(tiny_path, prompt, population.token_ids, [])):
            assert np.abs(population.token_log_probs[i] - want).max() <= 5e-4


class Noise(Potential):
    """Answers with noise of its process, at once or after a while in the background."""

    def __init__(self, waits):
        self.waits, self.found = waits, None

    def fetch(self, state, about):
        n = len(about)

        def find(future):
            self.found = torch.rand(n, dtype=torch.float64)

        return in_background(find) if self.waits else None

    def prefix(self, state):
        found, self.found = self.found, None
        return torch.rand(len(state.finished), dtype=torch.float64) if found is None else 3 * found


@pytest.mark.parametrize("waits", [False, True])
def test_segments(parallel, tiny_path, all_blocks_back, waits):
    """Rows of unequal length, and blocks that move with them, on both ranks; only one asks."""
    prompt = prompt_of(40)
    params = SMCParams(
        n_particles=8, max_tokens=60, ess_threshold=1.0, proposal="base", segment_token_ids=[1], max_segment_tokens=14
    )
    population = parallel.smc(prompt, params, Noise(waits))
    assert population.T > 60 and population.n_roots < 8
    for i, want in enumerate(hf_log_probs(tiny_path, prompt, population.token_ids)):
        drawn = population.tokens[np.arange(population.T), population.lineage(i)] >= 0
        assert np.abs(population.token_log_probs[i][drawn] - want).max() <= 5e-4


def test_interchange(parallel, tiny_path, all_blocks_back):
    """Each rank does the same on its share, and what is wrong is said without parting them."""
    bases, sources = ([prompt_of(40 + seed + i) for i in range(3)] for seed in (0, 3))
    configs = [Interchange(0, -1), Subspace(1, -1, orthonormal(5).T), Interchange(0, [32, 33, 2], -4)]
    found, want = (
        parallel.interchange(bases, sources, configs, logits=True),
        swapped(tiny_path, bases, sources, configs),
    )
    torch.testing.assert_close(found, want, rtol=0, atol=5e-5)
    states = HFEngine(tiny_path).activations(bases, [0, 1], [-1])
    torch.testing.assert_close(parallel.activations(bases, [0, 1], [-1]), states, rtol=0, atol=2e-5)
    texts = [prompt_of(n) for n in (40, 1, 7)]
    got, want = parallel.score(bases[0], texts), HFEngine(tiny_path).score(bases[0], texts)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=5e-4)
    with pytest.raises(ValueError, match="Subspace: is for hidden states of 9 elements"):
        parallel.interchange(bases, sources, Subspace(0, -1, torch.eye(9, 2)))


def test_rows_of_histories(parallel, tiny_path, all_blocks_back):
    """Each rank keeps its share of the same blocks, of a cache that is smaller than a call; rank 0 has the rows."""
    n_blocks, _ = parallel.collective_rpc("smc_open_histories", args=("h", 1 << 17))[0]
    histories = [prompt_of(n) for n in (100, 33, 7)]
    for asked in (histories, [[*ids, 2] for ids in histories], histories[::-1]):
        data, other = parallel.collective_rpc("smc_next_rows", args=("h", asked, True))
        assert other is None
        for ids, row in zip(asked, tensors_of(data)["found"], strict=True):
            want = np.concatenate(hf_log_probs(tiny_path, ids, [[token] for token in range(VOCAB)]))
            np.testing.assert_allclose(row, want, atol=5e-5)
        (first, second) = parallel.collective_rpc("smc_count_histories", args=("h",))
        assert first == second and sum(first) == n_blocks
    parallel.collective_rpc("smc_close_histories", args=("h",))


def test_counterfactuals(parallel, tiny_path, all_blocks_back):
    """Under interventions on whole states, and of facts, which each rank holds; an inside of an MLP is refused."""
    params, text = SMCParams(n_particles=6, max_tokens=30, ignore_eos=True), prompt_of(40)
    prompts, lists = [prompt_of(40 + i) for i in range(3)], [LISTS["steer"], None, LISTS["steer prompt"]]
    found = parallel.counterfactual(prompts, [text] * 3, lists, params=params)
    facts = [parallel.facts(prompt, text) for prompt in prompts]
    again = parallel.counterfactual(facts, None, lists, params=params)
    for one, other, prompt, parts in zip(found, again, prompts, lists, strict=True):
        for each in (one, other):
            assert np.abs(each.factual_log_probs - hf_log_probs(tiny_path, prompt, [text])[0]).max() <= 5e-4
            assert np.abs(each.stay - one.stay).max() <= 5e-4
            for ids, log_probs in zip(each.token_ids, each.token_log_probs, strict=True):
                assert np.abs(log_probs - hooked_log_probs(tiny_path, prompt, [ids], parts or [])[0]).max() <= 5e-4
    assert found[1].token_ids == [text[:30]] * 6 and (found[1].stay == 1.0).all() and (found[0].stay < 1).any()
    with pytest.raises(ValueError, match="RankOne: its site down_proj is sharded with tensor_parallel_size=2"):
        parallel.counterfactual(PROMPT, text, EACH["rank one"], params=params)


# -------------------------------------------------------------------------------------- answers that differ by rank
class Divergent(TableTwist):
    """Answers differently in every process, and puts down which processes have asked."""

    def __init__(self, how, folder):
        super().__init__(POTENTIAL.value.numpy())
        self.how, self.folder = how, folder

    def setup(self, engine):
        self.noise = torch.Generator().manual_seed(os.getpid())
        # a set of texts has another order in each process
        order = [int(text) for text in {str(token) for token in range(VOCAB)}]
        random.Random(os.getpid()).shuffle(order)
        self.bonus = torch.zeros(VOCAB, dtype=torch.float64)
        self.bonus[order] = torch.linspace(-2, 2, VOCAB, dtype=torch.float64)
        (self.folder / f"setup-{os.getpid()}").touch()

    def reset(self, n_particles, prompt):
        (self.folder / f"reset-{os.getpid()}").touch()

    def _change(self, n):
        return 2 * torch.randn(n, VOCAB, generator=self.noise) if self.how == "noise" else self.bonus.expand(n, -1)

    def prefix(self, state):
        return super().prefix(state) + self._change(len(state.finished))[:, 0].double()

    def logw_next(self, state):
        return super().logw_next(state) + self._change(len(state.finished))


@pytest.mark.parametrize("how", ["noise", "order"])
@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_answers_that_differ_by_rank(parallel, tiny_path, tmp_path, proposal, how, all_blocks_back):
    """The particles' log-probs are those of their tokens; one process has set the potential up and asked it."""
    params = SMCParams(n_particles=32, max_tokens=60, ess_threshold=1.0, proposal=proposal, stop_token_ids=[5], seed=2)
    populations = parallel.smc([prompt_of(50), PROMPT], params, Divergent(how, tmp_path))
    for prompt, population in zip([prompt_of(50), PROMPT], populations, strict=True):
        assert population.resampled[1:-1].any() and population.n_particles == 32
        check_log_probs(tiny_path, prompt, population)
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["reset", "setup"]


def put_messages_down(worker):
    if isinstance(worker.smc_runner, LeadingRunner):
        leader = worker.smc_runner.model
        leader.told, tell = [], leader._tell

        def put_down(call, *rows):
            leader.told.append(call.verb)
            tell(call, *rows)

        leader._tell = put_down


def messages(worker):
    """What rank 0 has told since `put_messages_down`."""
    if isinstance(worker.smc_runner, LeadingRunner):
        del worker.smc_runner.model._tell
        return worker.smc_runner.model.__dict__.pop("told")


def test_three_groups_in_one_pass(parallel, tiny_path, tmp_path, all_blocks_back):
    """A pass is one message however many groups are in it, and nothing but the end of the order is told beside."""
    prompts = [prompt_of(50), PROMPT, prompt_of(33)]
    potentials = [Divergent("noise", tmp_path), Divergent("order", tmp_path), Divergent("noise", tmp_path)]
    params = SMCParams(n_particles=12, max_tokens=40, ess_threshold=1.0, resampling="multinomial", seed=2)
    parallel.collective_rpc(put_messages_down)
    populations = parallel.smc(prompts, params, potentials)
    told = parallel.collective_rpc(messages)[0]
    for prompt, population in zip(prompts, populations, strict=True):
        check_log_probs(tiny_path, prompt, population)
    assert 40 <= told.count("forward") <= 42 and {*told} == {"forward", "end"}  # they do not arrive all at once
    assert told.count("end") < 20  # several steps in an order


def test_the_other_ranks_hold_nothing(parallel):
    names = parallel.collective_rpc(lambda worker: (type(worker.smc_runner).__name__, *vars(worker.smc_runner)))
    assert names[0][0] == "LeadingRunner" and names[1] == ("Follower", "_model", "_ranks")


# --------------------------------------------------------------------------- what a potential asks of the model
class TwoEnds(Potential):
    """Scores two continuations by the model, of unlike lengths; the second as often as the first one's score says."""

    lookahead = 5

    def setup(self, engine):
        self.engine = engine

    def prefix(self, state):
        if state.step == 0:
            return torch.zeros(len(state.finished), dtype=torch.float64)
        return self.complete(state)

    def complete(self, state):
        score = self.engine.continuation_log_prob([1, 4, 6, 2, 7])
        if float(score.max()) > -10.0:
            score = torch.logaddexp(score, self.engine.continuation_log_prob([3, 0]))
        return score


def ask_in_parts(worker):
    """Scores are made of 7 rows of logits at a time, 20 rows of hidden states."""
    worker.smc_runner.model.max_logits_rows, worker.smc_runner.model.max_tokens = 7, 20


def test_continuations_are_scored_by_all_ranks(parallel, engine, tiny_path, all_blocks_back):
    parallel.collective_rpc(lambda worker: hasattr(worker.smc_runner, "model") and ask_in_parts(worker))
    prompt, wanted = prompt_of(40), [1, 4, 6, 2, 7]
    for every_step in (False, True):
        params = SMCParams(n_particles=12, max_tokens=40, ess_threshold=0.0, stop_token_ids=[5], seed=4)
        population = parallel.smc(prompt, params, Infill(wanted, every_step))
        check_log_probs(tiny_path, prompt, population)
        scores = hf_log_probs(tiny_path, prompt, [tokens + wanted for tokens in population.token_ids])
        np.testing.assert_allclose(population.log_weights, [one[-5:].sum() for one in scores], atol=2.5e-3)
        same(population, engine.smc(prompt, params, Infill(wanted, every_step)))
    for make in (lambda: Infill(wanted, every_step=True), TwoEnds):
        same(*(llm.smc(prompt, EVERY_STEP, make()) for llm in (parallel, engine)))


def attend_always(worker):
    runner = worker.smc_runner
    if isinstance(runner, LeadingRunner):
        runner.model.attend.may_pay = lambda n_rows, length: True
        runner.model.attend.pays = lambda plan, length, group: length % 3 != 0
        return
    attend, stock = runner._model.attend, runner._model._stock_metadata
    runner.seen = {"attend": 0, "stock": 0}

    def counted(name, function):
        def call(*args):
            runner.seen[name] += 1
            return function(*args)

        return call

    attend.plan, runner._model._stock_metadata = counted("attend", attend.plan), counted("stock", stock)


def attend_as_it_pays(worker):
    model = getattr(worker.smc_runner, "_model", worker.smc_runner.__dict__.get("model"))
    for name in ("pays", "may_pay", "plan"):
        model.attend.__dict__.pop(name, None)
    model.__dict__.pop("_stock_metadata", None)
    return worker.smc_runner.__dict__.pop("seen", None)


def test_rank_zero_chooses_the_attention(parallel, engine, tiny_path, all_blocks_back):
    """Of two steps in three `attend`, by a plan that each rank makes for itself: the same particles."""
    parallel.collective_rpc(attend_always)
    population = parallel.smc(prompt_of(50), EVERY_STEP, POTENTIAL)
    check_log_probs(tiny_path, prompt_of(50), population)
    same(population, engine.smc(prompt_of(50), EVERY_STEP, POTENTIAL))
    lengths = range(51, 51 + 71)  # of the steps after the first one, whose row has nobody to share with
    stock = 1 + sum(length % 3 == 0 for length in lengths)
    assert parallel.collective_rpc(attend_as_it_pays)[1] == {"attend": 72 - stock, "stock": stock}


def test_a_learned_twist(parallel, engine, tiny_path, tmp_path, all_blocks_back):
    path = save_twist("linear", tiny_path, tmp_path / "twist")
    for proposal in ("twisted", "base"):
        params = params_of(24, 1.0, proposal=proposal)
        same(*(llm.smc(PROMPT, params, PHI, twist=path) for llm in (parallel, engine)))


class CallsTheModel(Potential):
    def setup(self, engine):
        assert engine.model is not None

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


def test_the_network_alone_is_refused_by_name(parallel, engine):
    params = SMCParams(n_particles=4, max_tokens=4)
    assert engine.smc(PROMPT, params, CallsTheModel()).log_z == 0.0
    with pytest.raises(SMCError, match=r"CallsTheModel.setup: .*engine.model: at tensor_parallel_size=2"):
        parallel.smc(PROMPT, params, CallsTheModel())


# ------------------------------------------------------------------------------------------------------ bad ends
class FailsOnRankZero(TwoEnds):
    """Fails where a model's answer is at hand, on one rank only."""

    def __init__(self, step):
        self.step = step

    def complete(self, state):
        score = super().complete(state)
        if state.step == self.step and torch.distributed.get_rank() == 0:
            raise TimeoutError("no answer")
        return score


@pytest.mark.parametrize("step", [1, 30])
def test_a_failure_ends_its_group_alone(parallel, engine, alone, all_blocks_back, step):  # noqa: F811
    good, bad = POTENTIAL, FailsOnRankZero(step)
    prompts = [prompt_of(50), PROMPT, prompt_of(9)]
    with pytest.raises(SMCError, match=f"FailsOnRankZero.prefix at step {step}.*TimeoutError: no answer") as caught:
        parallel.smc(prompts, PARAMS["base"], [good, bad, Broken("nan")])
    first, *others = caught.value.populations
    same(first, alone["base"])
    assert others == [None, None]
    same(parallel.smc(prompt_of(50), PARAMS["twisted"], good), alone["twisted"])
    outputs = [llm.generate({"prompt_token_ids": prompt_of(50)}, GREEDY, use_tqdm=False) for llm in (parallel, engine)]
    assert outputs[0][0].outputs[0].token_ids == outputs[1][0].outputs[0].token_ids


def test_aborts(parallel, alone, all_blocks_back):  # noqa: F811
    """In the queue, in its prefill and while it runs."""
    core, name = parallel.llm_engine, parallel.register_potential(POTENTIAL)
    for n_steps in (0, 1, 3, 6):
        request_id = str(next(parallel.request_counter))
        core.add_request(request_id, parallel._prompt(prompt_of(50)), parallel.lead_params(EVERY_STEP, name))
        for _ in range(n_steps):
            core.step()
        core.abort_request([request_id])
    parallel.drop_potential(name)
    same(parallel.smc(prompt_of(50), PARAMS["twisted"], POTENTIAL), alone["twisted"])


# ------------------------------------------------------------------------------------------ messages, with no engine
BLOCK, COLUMNS = 4, 6


class Net:
    """A `Model` that puts down its calls, over KV caches that are real."""

    device, block_size, max_tokens, max_logits_rows = torch.device("cpu"), BLOCK, 64, 64
    attend = None

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.caches = [torch.randn(200, 2, BLOCK, 3, generator=generator) for _ in range(2)]
        self.calls, self.fails = [], False

    def forward(self, batch):
        return self.logits(self.hidden(batch), slice(None)), None

    def hidden(self, batch):
        if self.fails:
            raise MemoryError("no room")
        kept = torch.stack([cache.sum() for cache in self.caches]).tolist()  # what is there when the call is made
        values = [(v.dtype, v.tolist()) if isinstance(v, torch.Tensor) else v for v in batch]
        self.calls.append((*values, kept))
        for cache in self.caches:
            for i, slot in enumerate(batch.slots.tolist()):
                cache[slot // BLOCK, :, slot % BLOCK] = float(batch.tokens[i] + i)
        return torch.arange(len(batch.tokens))

    def logits(self, hidden, rows):
        self.calls.append(hidden[rows].tolist())

    def clear(self, blocks):
        for cache in self.caches:
            cache[list(blocks)] = 0.0

    def reindex(self, table, ancestors, position):
        ops.reindex(table, ancestors, position=position, block_size=BLOCK, caches=self.caches, slot_dim=2)


@pytest.fixture
def pair():
    """A leader, its network, the messages that it has sent, and what the other rank's network has made of them."""
    sent, net, other = deque(), Net(), Net()
    follower = Follower(other, SimpleNamespace(broadcast_object=sent.popleft, rank_in_group=1))
    return Leader(net, SimpleNamespace(broadcast_object=sent.append)), net, sent, follower, other


def in_place_form(generator, n):
    ancestors = torch.randint(n, (n,), generator=generator)
    kept = torch.unique(ancestors)
    return ancestors.scatter(0, kept, kept)


def test_the_other_rank_makes_the_same_calls(pair):
    """Two groups of unlike size and length side by side, moves in plenty before, between and after the calls."""
    leader, net, sent, follower, other = pair
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        table, n_messages = torch.arange(14 * COLUMNS, dtype=torch.int32).view(-1, COLUMNS), 1
        with leader.order():
            for step in range(3, 14):
                position = torch.tensor([step] * 5 + [step + 3] * 9, dtype=torch.int32)
                for _ in range(int(torch.randint(3, (), generator=generator))):
                    both = in_place_form(generator, 5), in_place_form(generator, 9) + 5
                    leader.reindex(table, torch.cat(both), position)
                rows, n = torch.arange(0, 14, 1 + step % 2), 1 + 2 * (step % 3 == 0)
                used, at = table[rows], position[rows, None].long() + torch.arange(n)
                slots = used.gather(1, at // BLOCK).long() * BLOCK + at % BLOCK
                tokens = torch.randint(50, (len(rows) * n,), generator=generator)
                lengths, queries = (at[:, -1] + 1).int(), None if n == 1 else (n,) * len(rows)
                shared = ((0, 5 // (1 + step % 2), 1),) if step % 5 else ()
                variants = tokens % 3 - 1 if step % 2 else None
                batch = Batch(tokens, at.flatten(), slots.flatten(), used, lengths, step + 6, queries, shared)
                batch = batch._replace(variants=variants)
                n_messages += 1
                if n == 1:
                    leader.forward(batch)
                else:
                    hidden = leader.hidden(batch)
                    for begin in range(0, len(hidden), 4):
                        leader.logits(hidden, slice(begin, begin + 4))
                        n_messages += 1
            # of a group that no pass follows in this order
            leader.reindex(table, torch.cat([in_place_form(generator, 5), torch.arange(5, 14)]), position)
            leader.clear([150, 190])
        assert len(sent) == n_messages  # one per call, and the end
        assert follower.run(StepOrder([], [])) == [] and not sent
        assert other.calls == net.calls and len(net.calls) > 20
        assert all(map(torch.equal, other.caches, net.caches))


def test_what_fails_outside_the_model_leaves_the_ranks_together(pair):
    leader, net, sent, follower, other = pair
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    with pytest.raises(KeyError), leader.order():
        position = torch.full((3,), 6, dtype=torch.int32)
        leader.reindex(table, torch.tensor([0, 0, 2]), position)
        with pytest.raises(ValueError, match="ancestors"):
            leader.reindex(table, torch.tensor([1, 2, 0]), position)  # refused: moves nothing anywhere
        raise KeyError
    assert follower.run(StepOrder([], [])) == [] and not sent
    assert all(map(torch.equal, other.caches, net.caches)) and not torch.equal(net.caches[0], Net().caches[0])
    with pytest.raises(RuntimeError, match="outside an order"):
        leader.logits(torch.zeros(3), slice(None))
    assert not sent


def test_a_model_that_fails_fails_the_step(pair):
    """Even if a potential has swallowed the error: the other ranks wait in a collective."""
    leader, net, sent, _, _ = pair
    one = torch.zeros(1, dtype=torch.int64)
    batch = Batch(one, one, one, torch.zeros(1, 1, dtype=torch.int32), one.int() + 1, 1)
    runner = object.__new__(LeadingRunner)
    runner.model, runner.groups, runner.captured, runner._half = leader, {}, {}, None
    runner._unwritten, runner._parked = {}, {}
    runner._model = SimpleNamespace(riding=SimpleNamespace(why_not="this test"))
    net.fails = True

    def run_steps(order, results):
        for _ in range(2):
            with pytest.raises((MemoryError, RuntimeError), match="no room"):
                leader.forward(batch)

    runner._admit, runner._run_steps = lambda *args: None, run_steps
    part = SimpleNamespace(request_id="a", epoch=0)
    with pytest.raises(RuntimeError, match="tensor-parallel rank 0.*no room"):
        runner.run(StepOrder([part], []))
    assert [call.verb for call, _ in sent] == ["forward"]  # nobody hears what comes after


# ------------------------------------------------------------------------------------------------- the engine's end
def break_the_network(worker):
    if torch.distributed.get_rank() == 1:
        worker.smc_runner._model._model = None


def test_a_rank_that_cannot_follow_ends_the_engine(parallel):
    """At once, as when a worker dies, and not after a time-out. The last test of this engine."""
    parallel.collective_rpc(break_the_network)
    with pytest.raises(EngineDeadError):
        parallel.smc(PROMPT, PARAMS["base"], POTENTIAL)
