"""Potentials that requests name, prepared beside the engine's steps; and an operator's, set up before there are any."""

import json
import os
import threading
import time
from collections import Counter
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from prepared import VALUE, alive, begun, wait_until
from tiny import PROMPT, TableTwist
from vllm import SamplingParams

from fastsmc import SMCError, SMCParams
from fastsmc.potentials import GROUP, Lexicon, registry
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.scheduler import POLL
from fastsmc.vllm.shelf import Shelf

from .conftest import make_engine
from .test_engine import EVERY_STEP, same
from .test_twist import save_twist

SLOW, PLAIN = "prepared:Slow", "prepared:Plain"


def group_request(engine, potential=None, **args):
    params = engine.lead_params(EVERY_STEP, potential, return_population=True)
    params.extra_args["smc_potential_args"] = json.dumps(args)
    return params


@pytest.fixture
def slow(engine, tmp_path):
    """(add, step_until): adds a request, by what it is; steps until the requests named have ended. Their outputs.

    `tmp_path` is the folder of the potentials.
    """
    known = {name: EntryPoint(name, code, GROUP) for name, code in (("slow", SLOW), ("plain", PLAIN))}
    patched = pytest.MonkeyPatch()
    patched.setattr(registry, "registered", lambda: known)
    outputs, steps = {}, Counter()

    def add(kind, how="well"):
        request_id = str(next(engine.request_counter))
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        if kind == "group":
            params = group_request(engine, "slow", how=how, folder=str(tmp_path))
        elif kind == "plain group":
            params = group_request(engine)
        engine.llm_engine.add_request(request_id, engine._prompt(PROMPT), params)
        return request_id

    def step_until(*request_ids):
        until = time.monotonic() + 300
        while not set(request_ids) <= set(outputs):
            assert time.monotonic() < until
            for output in engine.llm_engine.step():
                steps[output.request_id] += 1
                if output.finished:
                    outputs[output.request_id] = output
        return [outputs[r] for r in request_ids]

    yield add, step_until
    patched.undo()
    (tmp_path / "gate").touch()


def error_of(output):
    return output.kv_transfer_params["smc"].get("error")


def test_no_step_waits_for_a_potential_to_be_prepared(engine, runner, scheduler, all_blocks_back, slow, tmp_path):
    """Ordinary requests and other groups run to their ends meanwhile; one preparation serves all that ask for it."""
    add, step_until = slow
    want = engine.smc(PROMPT, EVERY_STEP, TableTwist(VALUE))
    waiting = [add("group"), add("group")]
    others = [add("request"), add("plain group"), add("request")]
    step_until(*others)
    wait_until(lambda: begun(tmp_path))
    assert [group.waiting for group in scheduler._groups.values()] == [True, True]
    start = time.monotonic()
    for _ in range(20):  # alone: a step waits a little, so that the engine does not spin
        assert not engine.llm_engine.step()
    assert time.monotonic() - start > 20 * POLL / 2
    scheduler.reset_prefix_cache(reset_running_requests=True)  # they start again from their prompts
    late = add("request")
    step_until(late)
    (tmp_path / "gate").touch()
    for output in step_until(*waiting):
        same(engine.population(output), want)
    assert not runner.shelf._preparing and not runner._waiting
    step_until(add("group"))  # it is kept, by the value of its arguments
    params = group_request(engine, "slow", folder=str(tmp_path), how="well")
    assert not error_of(engine.generate([{"prompt_token_ids": PROMPT}], [params], use_tqdm=False)[0])
    assert [how for how, _ in begun(tmp_path)] == ["well"]
    assert all(pid != str(os.getpid()) for _, pid in begun(tmp_path))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "prepare raised ValueError: no automaton"),
        ("exit", "prepare raised SystemExit: 3"),
        ("die", "the process that prepared it ended, with exit status 5"),
        ("flow", "what prepare left of Slow cannot be pickled"),
        ("hold", "the process that prepared it was not done within setup_timeout_s=2, and was killed"),
    ],
)
def test_what_cannot_be_prepared_ends_its_groups_alone(
    engine, runner, all_blocks_back, slow, tmp_path, monkeypatch, how, message
):
    """Also where it ends its process, or holds it until that is killed: what runs beside it then comes to its end."""
    add, step_until = slow
    bad, good = [add("group", how), add("group", how)], [add("request"), add("plain group")]
    if how == "hold":
        monkeypatch.setattr(runner.shelf._preparer, "_seconds", 2)
        (tmp_path / "gate").touch()
        wait_until(lambda: (tmp_path / "child").exists() or engine.llm_engine.step() is None)
    step_until(good[0])
    (tmp_path / "gate").touch()
    for output in step_until(*bad):
        assert error_of(output).startswith(f"potential 'slow': {message}")
    assert not error_of(step_until(good[1])[0])
    assert [how for how, _ in begun(tmp_path)] == [how] and not runner.shelf._preparing and not runner._waiting
    if how == "hold":
        wait_until(lambda: not alive(begun(tmp_path)[0][1]))
        monkeypatch.undo()
    assert not error_of(step_until(add("group"))[0])


def test_a_preparation_that_is_given_up_while_it_is_asked_for_begins_anew():
    """Its thread looks at `wanted` just before a new group sets it."""

    class GivenUp:
        wanted, error, potential = False, None, None
        asked = 0

        def __init__(self):
            self.done = threading.Event()
            self.done.set()

        @property
        def given_up(self):
            self.asked += 1
            return self.asked > 1

    shelf = Shelf(SimpleNamespace(skip_tokenizer_init=True), EngineOptions(), None)
    shelf._preparing = {"slow {}": GivenUp()}
    start = SimpleNamespace(potential="slow", potential_args="{}")
    assert not shelf.is_ready(start) and shelf._preparing["slow {}"].given_up


def test_abort_of_a_group_that_waits(engine, runner, scheduler, all_blocks_back, slow, tmp_path):
    add, step_until = slow
    gone = add("group", "aborted")
    step_until(add("request"))
    assert [group.waiting for group in scheduler._groups.values()] == [True]
    engine.llm_engine.abort_request([gone])
    step_until(add("request"))
    assert not runner._waiting
    (tmp_path / "gate").touch()
    step_until(add("plain group"), add("group", "aborted"))  # what was begun for the other serves this one
    assert [how for how, _ in begun(tmp_path)] == ["aborted"]


# ------------------------------------------------------------------------------------------- an operator's options
@pytest.fixture
def opened(runner):
    """A shelf as a server's with these options has it before requests come."""
    shelves = []

    def make(**options):
        config = SimpleNamespace(skip_tokenizer_init=True)
        shelves.append(Shelf(config, EngineOptions(**options), lambda tokenizer: runner.shelf.engine()))
        shelves[-1].open({})
        return shelves[-1]

    yield make
    for shelf in shelves:
        shelf.close()


def start_of(potential, args="{}", twist=None):
    return SimpleNamespace(potential=potential, potential_args=args, twist=twist)


def test_an_operators_own_is_there_before_requests(opened, tiny_path, tmp_path):
    """And stays there, however many others requests name. What takes arguments is prepared when they are given."""
    twist = save_twist("mlp", tiny_path, tmp_path / "twist")
    codes = {"plain": PLAIN, "slow": SLOW, "lexicon": "fastsmc.potentials:Lexicon"}
    shelf = opened(potentials=codes, twists={"warm": str(twist)})
    assert shelf.is_ready(start_of("plain")) and shelf.of(start_of("plain")).prepared_in == os.getpid()
    guided = shelf.of(start_of("plain", twist="warm"))
    (twist / "card.json").unlink()  # nobody looks there again
    assert shelf.of(start_of("plain", twist="warm")) is guided
    assert set(shelf._kept) == {"plain {}", "twist warm"}
    for i in range(40):
        shelf._make_room()
        shelf.put(f"other {i}", Lexicon(token_ids=[1]))
    assert shelf._kept < set(shelf._potentials) and len(shelf._potentials) < 40
    start = start_of("lexicon", '{"token_ids": [1]}')
    wait_until(lambda: shelf.is_ready(start))
    assert isinstance(shelf.of(start), Lexicon)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"potentials": {"bad": "prepared:Broken"}}, r"potentials\['bad'\]='prepared:Broken': .*RuntimeError: no such"),
        (
            {"potentials": {"bad": "prepared:Nobody"}},
            r"potentials\['bad'\]='prepared:Nobody': .*cannot load",
        ),
        ({"potentials": {"bad": "nowhere:Mine"}}, r"potentials\['bad'\]='nowhere:Mine': .*cannot load"),
        ({"potentials": {"bad": "prepared:alive"}}, None),  # it takes an argument, so nobody can say
        ({"potentials": {"bad": "os:getpid"}}, r"potentials\['bad'\]='os:getpid': .*does not make a fastsmc.Potential"),
        ({"twists": {"bad": "/no/such"}}, r"twists\['bad'\]='/no/such': .*card.json"),
    ],
)
def test_an_operators_own_that_cannot_be_set_up_is_named(opened, options, message):
    if message is None:
        opened(**options)
        return
    with pytest.raises(SMCError, match=message):
        opened(**options)


def test_an_engine_with_an_operators_potentials(tiny_path, engine, tmp_path):
    """One that is broken stops the start by its name. No process of an engine's outlives it."""
    with pytest.raises(SMCError, match=r"potentials\['bad'\]='prepared:Broken'"):
        make_engine(tiny_path, potentials={"bad": "prepared:Broken"})
    served = make_engine(
        tiny_path, in_process=False, potentials={"slow": SLOW, "plain": PLAIN}, max_particles=16, setup_timeout_s=600
    )
    want = engine.smc(PROMPT, EVERY_STEP, TableTwist(VALUE))
    params = group_request(served, "plain")
    same(served.population(served.generate([{"prompt_token_ids": PROMPT}], [params], use_tqdm=False)[0]), want)
    for wrong, message in (
        (served.lead_params(SMCParams(n_particles=17)), "n_particles=17: at most max_particles=16"),
        (served.lead_params(SMCParams(n_particles=4), "lexicon"), "smc_potential='lexicon': unknown; known are 'slow'"),
    ):
        with pytest.raises(ValueError, match=message):
            served.generate([{"prompt_token_ids": PROMPT}], [wrong], use_tqdm=False)
    (tmp_path / "gate").touch()
    params = group_request(served, "slow", folder=str(tmp_path), how="hold")
    served.llm_engine.add_request("9999", served._prompt(PROMPT), params)
    wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    helper, child = begun(tmp_path)[0][1], (tmp_path / "child").read_text()
    assert alive(helper) and alive(child)
    served.shutdown()
    wait_until(lambda: not alive(helper) and not alive(child))
