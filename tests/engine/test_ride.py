"""Rows that ride in ordinary decode steps of the CPU's runner: one forward pass for both, and nobody's bits change.

test_ride_v2.py has the GPU's runner."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny import PROMPT, TableTwist
from vllm import SamplingParams
from vllm.forward_context import get_forward_context

from fastsmc.potentials import Infill
from fastsmc.vllm import riding
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.model import take_plan
from fastsmc.vllm.pace import RIDES, Pace
from fastsmc.vllm.passes import Pass

from .test_engine import Broken, prompt_of
from .test_groups import VALUE, Request, Run, each_alone, identical, mixed, step_until

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU's runner, whose bits do not hang on the batch"
)

DECODES = [
    (prompt_of(40 + i, i), SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True))
    for i, n in enumerate((400, 90, 60))
]


@pytest.fixture
def calls(runner):
    """The tokens of each call of the model, and how many of them are the groups' rows."""
    seen = []

    def look(module, args, kwargs):
        slots = next(iter(get_forward_context().slot_mapping.values()))
        assert len(slots) == len(kwargs["input_ids"]) == len(kwargs["positions"])
        seen.append(len(kwargs["input_ids"]))

    hook = runner.model._model.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.fixture
def orders(scheduler, monkeypatch):
    """(ordinary tokens, orders' groups, orders' max_rows, whether prefill is in it) of each engine step."""
    seen, schedule = [], scheduler.schedule

    def look(*args, **kwargs):
        output = schedule(*args, **kwargs)
        tokens = output.num_scheduled_tokens
        prefill = any(n > 1 for n in tokens.values())
        seen.append((len(tokens), len(output.smc.groups), output.smc.max_rows, prefill))
        return output

    monkeypatch.setattr(scheduler, "schedule", look)
    return seen


def tokens_of(run_):
    return [list(run_.outputs[i].outputs[0].token_ids) for i in run_.others]


def beside(engine, requests, ordinary=DECODES[:1]):
    """Begins requests beside others that decode already."""
    both = Run(engine, [], ordinary)
    for _ in range(4):
        both.step()
    both.ids = [both.add(engine._prompt(r.prompt), r.lead(engine, both.names)) for r in requests]
    return both


@pytest.fixture(scope="module")
def greedy(engine):
    """The tokens of `DECODES` without a group."""
    alone = Run(engine, [], DECODES)
    alone.to_the_end()
    engine.llm_engine.engine_core.engine_core.scheduler.reset_prefix_cache()
    return tokens_of(alone)


@pytest.mark.parametrize("attention", ["as it pays", "attend", "both"])
@pytest.mark.parametrize("bound", [7, 64, "all"])
def test_the_bits_of_each_alone(
    engine, scheduler, calls, orders, greedy, all_blocks_back, monkeypatch, attention, bound
):
    """Groups of all kinds beside three requests: what each is alone, whichever way it attends and passes are cut."""
    if attention != "as it pays":
        always = attention == "attend"
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda self, plan, length, group=0: always or length % 3 > 0)
    requests = [*mixed(6), Request(prompt_of(31), Infill([2, 4], True), n_particles=4, max_tokens=12, seed=3)]
    want = each_alone(engine, requests)
    monkeypatch.setattr(scheduler, "_pace", Pace(bound, scheduler._pace._logger))
    calls.clear()
    orders.clear()
    both = beside(engine, requests, DECODES)
    identical(both.to_the_end(), want)
    assert tokens_of(both) == greedy
    rides = [order for order in orders if order[0] and order[1]]
    assert len(rides) >= 38 and not any(prefill for *_, prefill in rides)
    # where a step decodes only, no particle-only step comes after it as long as there are others
    for before, after in itertools.pairwise(orders):
        assert not (before[0] and not before[3] and after[1] and not after[0] and after[2] is not None)


def test_fewer_passes_than_in_turns(engine, runner, scheduler, calls, orders, all_blocks_back, monkeypatch):
    requests = [Request(prompt_of(50), TableTwist(3 * VALUE), n_particles=20, max_tokens=30, ess_threshold=1.0, seed=1)]
    found, heads = {}, []  # a product of the head's each
    hook = runner.model._model.logits_processor.register_forward_pre_hook(lambda *_: heads.append(1))
    for rides in (False, True):
        monkeypatch.setattr(runner.model.riding, "why_not", None if rides else "this test")
        monkeypatch.setattr(scheduler, "_pace", Pace("all", scheduler._pace._logger))
        both = beside(engine, requests)
        calls.clear()
        heads.clear()
        orders.clear()
        step_until(both, lambda both=both: both.ids[0] in both.outputs)
        found[rides] = len(calls), len(heads), sum(tokens for tokens, *_ in orders)
        engine.llm_engine.abort_request(both.others)
        both.to_the_end()
    # a prefill, 30 particle steps and 29 of the other request's meanwhile: the first comes after the prefill
    assert found == {False: (1 + 30 + 29, 1 + 30 + 29, 2 + 29), True: (1 + 30, 1 + 30, 2 + 29)}
    hook.remove()


def test_a_plain_decode_step_now_and_then(engine, scheduler, orders, all_blocks_back, monkeypatch):
    monkeypatch.setattr(scheduler, "_pace", Pace(None, scheduler._pace._logger))
    both = beside(engine, [Request(PROMPT, n_particles=9, max_tokens=4 * RIDES, ess_threshold=1.0)])
    orders.clear()
    step_until(both, lambda: both.ids[0] in both.outputs)
    plain = [i for i, (tokens, groups, *_) in enumerate(orders) if tokens and not groups]
    # the first of four comes after the prefill, and maybe after a step of the group's
    assert len(plain) >= 4
    assert [b - a for a, b in itertools.pairwise(plain[-3:])] == [RIDES + 1, RIDES + 1]
    engine.llm_engine.abort_request(both.others)
    both.to_the_end()


def test_who_does_not_ride(engine, scheduler, orders, all_blocks_back, monkeypatch):
    """Groups that are alone have steps of their own, and so has a pass that is too large to ride whole or at all."""
    shared = Request(PROMPT, TableTwist(VALUE), n_particles=9, max_tokens=20, ess_threshold=1.0, seed=2)
    alone = Request(PROMPT, TableTwist(VALUE), alone=True, n_particles=5, max_tokens=20, ess_threshold=1.0, seed=3)
    want = each_alone(engine, [shared, alone])
    monkeypatch.setattr(scheduler, "_pace", Pace(9, scheduler._pace._logger))
    orders.clear()
    both = beside(engine, [shared, alone], DECODES[:2])
    step_until(both, lambda: set(both.ids) <= set(both.outputs))
    assert sum(groups > 0 and tokens == 0 for tokens, groups, *_ in orders) >= 20
    assert sum(groups > 0 and tokens > 0 for tokens, groups, *_ in orders) > 5
    limits = scheduler._limits
    for budget, bound in ((10, "all"), (3, 64)):
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "_limits", type(limits)(**{**vars_of(limits), "max_num_batched_tokens": budget}))
            patch.setattr(scheduler, "_pace", Pace(bound, scheduler._pace._logger))
            orders.clear()
            small = Request(PROMPT, TableTwist(VALUE), n_particles=9, max_tokens=5, ess_threshold=1.0, seed=2)
            third = both.add(engine._prompt(small.prompt), small.lead(engine, both.names))
            step_until(both, lambda third=third: third in both.outputs)
            assert not any(tokens and groups for tokens, groups, *_ in orders)
    engine.llm_engine.abort_request(both.others)
    identical(both.to_the_end(), want)


def vars_of(limits):
    return {name: getattr(limits, name) for name in type(limits).__dataclass_fields__}


@pytest.mark.parametrize("end", ["abort", "preemption", "the other request ends", "a prompt comes"])
def test_ends_in_the_middle_of_a_ride(engine, runner, scheduler, all_blocks_back, monkeypatch, end):
    requests = [
        Request(prompt_of(50), TableTwist(3 * VALUE), n_particles=12, ess_threshold=1.0, seed=1),
        Request(PROMPT, TableTwist(VALUE), n_particles=9, ess_threshold=0.8, seed=2, temperature=0.8),
    ]
    want = each_alone(engine, requests)
    monkeypatch.setattr(scheduler, "_pace", Pace(8, scheduler._pace._logger))
    both = beside(engine, requests)
    groups = runner.groups.values()
    step_until(both, lambda: len(groups) == 2 and runner._half and all(m.group.t > 2 for m in groups))
    gone = both.others
    if end == "abort":
        gone = [*gone, both.ids[1]]
    elif end == "preemption":
        assert scheduler.reset_prefix_cache(reset_running_requests=True)
    elif end == "a prompt comes":
        both.add(engine._prompt(prompt_of(300)), SamplingParams(max_tokens=3, temperature=0.0))
        both.step()
        both.step()
    engine.llm_engine.abort_request(gone)
    got = both.to_the_end()
    if end == "abort":
        assert got.pop() is None
    identical(got, want[: len(got)])
    assert runner._half is None


@pytest.mark.parametrize("where", ["before", "after", "a potential"])
def test_a_failure_of_ours_leaves_the_ordinary_step_alone(
    engine, runner, scheduler, greedy, all_blocks_back, monkeypatch, where
):
    requests = [
        Request(PROMPT, TableTwist(VALUE), n_particles=9, max_tokens=20, seed=2),
        Request(PROMPT, Broken("raises"), n_particles=5, max_tokens=20, seed=1),
    ]
    want = each_alone(engine, requests[:1])
    both = beside(engine, requests, DECODES)

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    if where == "a potential":
        got = both.to_the_end()
        assert "Broken.prefix at step 3: raised KeyError" in got.pop()
        identical(got, want)
    else:
        step_until(both, lambda: len(runner.groups) == 2)
        with monkeypatch.context() as patch:
            patch.setattr(*{"before": (runner.model, "ride"), "after": (Pass, "put")}[where], fail)
            step_until(both, lambda: not runner.groups)
        error = "internal error in a forward pass that 2 groups shared: MemoryError: no room"
        assert both.to_the_end() == [error] * 2
    assert tokens_of(both) == greedy


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", None),
        ({}, "cuda", "vLLM's V1 runner pads"),
        ({"v2": True}, "cuda", None),
        ({"ranks": 2}, "cpu", "tensor-parallel ranks"),
        ({"v2": True, "impl": "FlashInferImpl"}, "cuda", "FlashInferImpl cannot attend for a batch in parts"),
        ({"v2": True, "ubatching": True}, "cuda", "enable_dbo"),
        ({"v2": True, "fused": True}, "cuda", "fuse_attn_quant"),
    ],
)
def test_where_nothing_rides_it_is_said_why(monkeypatch, changes, device, reason):
    monkeypatch.setattr(riding, "get_tp_group", lambda: SimpleNamespace(world_size=changes.get("ranks", 1)))
    kind = type(changes["impl"], (), {}) if "impl" in changes else riding.AttendImpl
    config = SimpleNamespace(
        use_v2_model_runner=changes.get("v2", False),
        parallel_config=SimpleNamespace(use_ubatching=changes.get("ubatching", False)),
        compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(impl=kind.__new__(kind))},
            pass_config=SimpleNamespace(fuse_attn_quant=changes.get("fused", False)),
        ),
    )
    runner = SimpleNamespace(model=None, vllm_config=config)
    found = riding.Riding(runner, ["layer"], torch.device(device), None).why_not
    assert found == reason or reason in found


def test_two_batches_have_plans_of_their_own():
    """FlashAttention 3's builder gives each batch the same buffer, cut to its size."""
    buffer = torch.arange(8, dtype=torch.int32)
    first = SimpleNamespace(scheduler_metadata=buffer[:5])
    take_plan(first)
    buffer.fill_(-1)
    assert first.scheduler_metadata.tolist() == [0, 1, 2, 3, 4]
    for other in (SimpleNamespace(scheduler_metadata=None), SimpleNamespace()):
        take_plan(other)
        assert vars(other) in ({}, {"scheduler_metadata": None})
