"""A group's own copy of a potential: whatever its state is made of, in every driver, and tables held once."""

import collections
import dataclasses
import functools
import itertools
import random
import re
import socket
import threading
import timeit

import numpy as np
import psutil
import pytest
import torch
from paged import PagedLlama
from tiny import PROMPT, TinyLlama, make_llama, run_table

from fastsmc import Potential, SMCParams
from fastsmc.hf import HFEngine
from fastsmc.potentials import Final, Infill, Lexicon, Product, Regex, Rows
from fastsmc.potentials.copying import own_copy
from fastsmc.smc import GroupEngine, SMCError, set_up
from fastsmc.smc.captured import CapturedGroup
from fastsmc.twists import Card, Head, Twist

VOCAB, STEPS = 6, 4


class Zero(Potential):
    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    lock: object


class Slots:
    __slots__ = ("tensor",)


class Client:
    def __init__(self):
        self.socket, self.buffer = socket.socket(), [1]


class Helper:
    def __init__(self, client, tensor):
        self.client, self.tensor, self.me = client, tensor, self


Pair = collections.namedtuple("Pair", "a b")


def test_state_of_every_kind_is_the_copys_own():
    p = Zero()
    p.tensor = torch.zeros(6)
    p.view, p.as_numpy = p.tensor[2:4], p.tensor.numpy()
    p.array = np.arange(6.0)
    p.every_other, p.as_tensor = p.array[::-2], torch.from_numpy(p.array)
    p.objects = np.array([p.tensor, None], dtype=object)
    p.list, p.dict, p.pair = [p.tensor, p], {"k": [p.view]}, Pair(p.tensor, 1)
    p.default = collections.defaultdict(list, {1: [2]})
    p.deque = collections.deque([p.tensor], maxlen=3)
    p.frozen, p.slots = Frozen(p.tensor, threading.Lock()), Slots()
    p.slots.tensor = p.tensor
    p.method, p.append, p.partial = p.prefix, p.list.append, functools.partial(max, p.list)
    p.cached = functools.lru_cache(4)(p.prefix)
    p.random, p.numpy_random = random.Random(1), np.random.default_rng(1)
    p.torch_random = torch.Generator().manual_seed(1)
    p.sparse, p.conjugate = torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj()
    q = own_copy(p)

    q.view += 5
    assert q.tensor[2] == 5 and q.as_numpy[2] == 5 and p.tensor[2] == 0 and p.as_numpy[2] == 0
    p.tensor[0] = 9
    assert p.as_numpy[0] == 9 and q.tensor[0] == 0
    q.array[5] = 77
    assert q.every_other[0] == 77 and q.as_tensor[5] == 77 and p.array[5] == 5
    held = (q.list[0], q.pair.a, q.deque[0], q.frozen.tensor, q.slots.tensor, q.objects[0])
    assert all(tensor is q.tensor for tensor in held) and q.dict["k"][0] is q.view
    assert q.list[1] is q and q.method.__self__ is q and q.append.__self__ is q.list and q.partial.args[0] is q.list
    assert q.cached.__wrapped__.__self__ is q
    assert q.default == p.default and q.default[1] is not p.default[1] and q.default.default_factory is list
    assert q.deque.maxlen == 3 and type(q.pair) is Pair
    assert q.random.random() == p.random.random() and q.numpy_random.random() == p.numpy_random.random()
    assert torch.rand(1, generator=q.torch_random) == torch.rand(1, generator=p.torch_random)
    assert torch.equal(q.sparse.to_dense(), torch.eye(2)) and torch.equal(q.conjugate, p.conjugate)


def test_what_is_shared():
    engine = GroupEngine(tokenizer=object(), vocab_size=3, model=torch.nn.Linear(2, 2))
    p = Zero()
    p.engine, p.tokenizer, p.net, p.fn = engine, engine.tokenizer, torch.nn.Linear(2, 2), len
    p.weight = engine.model.weight.detach()
    p.lock, p.event, p.pattern = threading.Lock(), threading.Event(), re.compile("a")
    p.table = np.arange(3)
    p.table.flags.writeable = False
    p.helper = Helper(Client(), torch.zeros(2))
    q = own_copy(p, engine)
    for name in ("engine", "tokenizer", "net", "fn", "weight", "lock", "event", "pattern", "table"):
        assert getattr(q, name) is getattr(p, name), name
    # the object that holds the connection is shared; what holds that object has a state of its own
    assert q.helper.client is p.helper.client and q.helper.me is q.helper and q.helper.tensor is not p.helper.tensor
    p.helper.client.socket.close()


def test_a_subclass_of_a_builtin_has_state_of_its_own():
    class Counting(Lexicon):
        def setup(self, engine):
            super().setup(engine)
            self.count = torch.zeros(2)

    p = Counting(token_ids=[1])
    p.setup(GroupEngine(vocab_size=3))
    q = own_copy(p)
    q.count += 1
    assert p.count.tolist() == [0, 0] and q._member is p._member and q._change is p._change


def test_a_factor_that_stands_twice_is_two():
    p = Zero()
    p.state = torch.zeros(2)
    q = own_copy(Product(p, Final(p), Product(p)))
    states = [q.factors[0].state, q.factors[1].potential.state, q.factors[2].factors[0].state]
    states[0] += 1
    assert [s.tolist() for s in states] == [[1, 1], [0, 0], [0, 0]] and p.state.tolist() == [0, 0]


@pytest.mark.parametrize(
    "flow", [lambda: iter([1]), lambda: (i for i in []), itertools.count, lambda: zip([1], strict=True)]
)
def test_iterators_are_refused_by_name(flow):
    p = Zero()
    p.frozen = Frozen([{"k": flow()}], None)
    name = type(p.frozen.tensor[0]["k"]).__name__
    with pytest.raises(ValueError, match=rf"Zero\.frozen\.tensor\[0\]\['k'\]: is a {name}"):
        own_copy(Product(Lexicon(token_ids=[1]), p).factors[1])
    with pytest.raises(SMCError, match=r"Product\.factors\[1\]\.frozen\.tensor"):
        set_up(Product(Zero(), p), GroupEngine(vocab_size=3))


# -- memory and time ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def big():
    """A potential of each kind, with tables of 8 MB and more; and where the tables begin in memory."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(map(chr, range(97, 123)))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoders.ByteLevel()
    size = 1 << 15
    engine = GroupEngine(PreTrainedTokenizerFast(tokenizer_object=inner), vocab_size=size, hidden_size=64)
    card = Card(
        kind="linear",
        loss="ctl",
        base_model="x",
        vocab_size=size,
        hidden_size=64,
        tokenizer=None,
        input_size=64,
        rank=64,
    )
    twist, regex, mine, lexicon = (
        Twist(card, Head(64, size, None)),
        Regex("[a-z]{1,30}"),
        Zero(),
        Lexicon(token_ids=[1]),
    )
    engine.model_name = "x"
    for potential in (twist, regex, lexicon):
        potential.setup(engine)
    mine.table = torch.zeros(1 << 21)
    return engine, [twist, regex, mine, lexicon, Product(twist, Final(regex))]


def test_64_copies_hold_the_tables_once(big):
    engine, potentials = big
    for potential in potentials:
        own_copy(potential, engine)
    before = psutil.Process().memory_info().rss
    copies = [own_copy(potential, engine) for potential in potentials for _ in range(64)]
    mine = [c for c in copies if type(c) is Zero]
    assert sum(float(c.table[3] + c.table[5:9].sum()) for c in mine) == 0.0  # reading copies nothing
    assert psutil.Process().memory_info().rss - before < 16 << 20  # one table a copy would be 64 · 8 MB
    mine[0].table[3] = 1.0
    assert mine[1].table[3] == 0.0 and potentials[2].table[3] == 0.0
    regexes = [c for c in copies if type(c) is Regex]
    assert all(c._automaton is potentials[1]._automaton for c in regexes)


def test_a_copy_takes_less_than_a_millisecond(big):
    engine, potentials = big
    for potential in [*potentials, Infill([1, 2])]:
        least = min(timeit.repeat(lambda p=potential: own_copy(p, engine), number=10, repeat=30)) / 10
        assert least < 1e-3, (type(potential).__name__, least)


# -- in every driver ---------------------------------------------------------------------------------------------------
class Even(Potential):
    """log ψ = number of even tokens, counted in a tensor that `setup` made and that is updated in place."""

    capturable = True

    def setup(self, engine=None):
        self.count = torch.zeros(64, dtype=torch.float64)

    def reset(self, n_particles, prompt):
        self.n = n_particles
        self.count.zero_()

    def reindex(self, ancestors):
        self.count[: self.n] = self.count[: self.n][ancestors]

    def prefix(self, state):
        if state.last_tokens is not None:
            even = (state.last_tokens >= 0) & (state.last_tokens % 2 == 0)
            self.count[: self.n] += even & (torch.as_tensor(state.step) > 0)
        return self.count[: self.n].clone()


class Scribbler(Potential):
    """A twist by the last token that answers from buffers which it uses again, and overwrites all that it is given."""

    capturable = True

    def __init__(self, scribbles):
        self.scribbles = scribbles

    def reset(self, n_particles, prompt):
        self.score = torch.zeros(n_particles, dtype=torch.float64)
        self.next, self.index = torch.zeros(n_particles, VOCAB), torch.arange(n_particles)
        self._spoil(prompt)

    def _spoil(self, *given):
        for value in given if self.scribbles else ():
            if isinstance(value, list):
                value.clear()
            elif value is not None:
                value.fill_(1)

    def _spoil_state(self, state):
        self._spoil(state.tokens, state.last_tokens, state.lengths, state.finished, state.prompt)
        for name in ("hidden", "hidden_rows", "rows", "step"):
            value = getattr(state, name, None)
            self._spoil(value if isinstance(value, torch.Tensor) else None)

    def reindex(self, ancestors):
        self._spoil(ancestors)
        if self.scribbles:
            self.next.fill_(-9.0), self.score.fill_(-9.0), self.index.zero_()

    def _value(self, state):
        value = torch.where(state.tokens >= 0, 0.3 * (state.tokens % 3), 0.0).double().sum(1)
        hidden = getattr(state, "hidden", None)
        return value if hidden is None else value + 0.01 * hidden.sum(1).tanh()

    def prefix(self, state):
        self.score.copy_(self._value(state))
        self._spoil_state(state)
        return self.score

    def complete(self, state):
        if self.scribbles:
            self.next.fill_(7.0)
        return Scribbler.prefix(self, state)

    def logw_next(self, state):
        self.next.copy_(0.3 * (torch.arange(VOCAB) % 3).expand_as(self.next))
        self.index.copy_(torch.arange(len(self.index)))
        self._spoil_state(state)
        return Rows(self.next, self.index)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"), VOCAB)


@pytest.fixture(scope="module")
def drivers(path):
    """params, potential → population, by each driver but vLLM's (that is in tests/engine)."""
    hf, tiny = HFEngine(path, stop_token_ids=[5]), TinyLlama(path, VOCAB, STEPS, frozenset([5]))

    def captured(params, potential):
        own = params.n_particles * ((len(PROMPT) + params.max_tokens) // 4 + 1)
        model = PagedLlama(path, len(PROMPT) + own, 4, "cpu", False)
        blocks = model.prefill(PROMPT)
        pool = torch.arange(len(blocks), len(blocks) + own, dtype=torch.int32)
        return CapturedGroup(params, model, potential, PROMPT, blocks, pool, frozenset([5])).run()

    return {
        "hf": lambda params, potential: hf.smc(PROMPT, params, potential),
        "table": lambda params, potential: run_table(tiny, params, potential),
        "captured": captured,
    }


@pytest.mark.parametrize("driver", ["hf", "table", "captured"])
def test_one_object_in_several_groups(drivers, driver):
    run, params = drivers[driver], [SMCParams(n_particles=16, max_tokens=STEPS, group=g) for g in range(3)]

    def fresh():
        potential = Even()
        potential.setup()
        return potential

    alone, potential = [run(p, fresh()) for p in params], fresh()
    again = [run(p, potential) for p in params]
    assert [p.log_z for p in again] == [p.log_z for p in alone] and potential.count.sum() == 0


def test_groups_side_by_side(path):
    hf, params = HFEngine(path), SMCParams(n_particles=16, max_tokens=STEPS)
    both = hf.smc([PROMPT, PROMPT], params, Even())
    alone = [hf.smc(PROMPT, dataclasses.replace(params, group=g), Even()) for g in range(2)]
    assert [p.log_z for p in both] == [p.log_z for p in alone]


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("driver", ["hf", "table", "captured"])
def test_nothing_that_a_potential_gets_or_gives_is_the_groups(drivers, driver, proposal):
    params = SMCParams(n_particles=16, max_tokens=STEPS, proposal=proposal, ess_threshold=1.0, resampling="multinomial")
    want, got = (drivers[driver](params, Scribbler(scribbles)) for scribbles in (False, True))
    assert got.token_ids == want.token_ids and np.array_equal(got.ancestors, want.ancestors)
    assert np.array_equal(got.log_weights, want.log_weights) and got.log_z == want.log_z
    assert got.prompt_token_ids == PROMPT and want.resampled[1:].all()


# -- answers that are no log weights -----------------------------------------------------------------------------------
class Answers(Potential):
    """Gives what it was told to from step 1 on."""

    capturable = True

    def __init__(self, method, answer):
        self.method, self.answer = method, answer

    def _give(self, method, state, good):
        return self.answer(good) if method == self.method and int(state.step) >= 1 else good

    def prefix(self, state):
        return self._give("prefix", state, torch.zeros(len(state.finished)))

    def complete(self, state):
        return self._give("complete", state, torch.zeros(len(state.finished)))

    def logw_next(self, state):
        return self._give("logw_next", state, torch.zeros(len(state.finished), VOCAB))


BAD = {
    "bool": lambda good: good == 0,
    "int": lambda good: good.long(),
    "complex": lambda good: good.to(torch.complex64),
    "list": lambda good: good.tolist(),
    "array": lambda good: good.numpy(),
    "number": lambda good: 0.0,
    "shape": lambda good: good[:-1],
    "column": lambda good: good[..., None],
    "device": lambda good: good.to("meta"),
    "sparse": lambda good: good.to_sparse(),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", ["prefix", "complete", "logw_next"])
@pytest.mark.parametrize("driver", ["hf", "captured"])
def test_answers_that_are_no_log_weights(drivers, driver, method, bad):
    params = SMCParams(n_particles=4, max_tokens=2, proposal="base" if method == "prefix" else "twisted")
    step = "1" if method != "complete" else "[12]"  # a captured group asks at every step
    potentials = {"Answers": Answers(method, BAD[bad])}
    if driver != "captured":
        potentials["Product"] = Zero() * potentials["Answers"]
    for name, potential in potentials.items():
        with pytest.raises(SMCError, match=rf"potential {name}\.{method} at step {step}.*returned") as caught:
            drivers[driver](params, potential)
        assert "Answers" in str(caught.value)


@pytest.mark.parametrize("driver", ["hf", "captured"])
def test_any_matrix_of_floats_is_fine(drivers, driver):
    params = SMCParams(n_particles=4, max_tokens=3)
    want = drivers[driver](params, Answers("logw_next", lambda good: good))
    for view in (
        lambda good: good.T.contiguous().T,
        lambda good: good.double(),
        lambda good: good.bfloat16(),
        lambda good: good[:1, :1].expand(4, VOCAB),
        lambda good: torch.zeros(4, 2 * VOCAB)[:, ::2],
        lambda good: Rows(torch.zeros(VOCAB, 1).T, torch.zeros(4, dtype=torch.int32)),
    ):
        assert drivers[driver](params, Answers("logw_next", view)).token_ids == want.token_ids


def test_rows_out_of_range_are_named(drivers):
    for at in (3, -1):
        bad = Answers("logw_next", lambda good, at=at: Rows(good[:2], torch.tensor([0, 0, at, 0])))
        for potential in (bad, Answers("logw_next", lambda good: good) * bad):
            with pytest.raises(SMCError, match=rf"logw_next.*index\[2\]={at}"):
                drivers["hf"](SMCParams(n_particles=4, max_tokens=3), potential)


# -- whatever a user's code raises -------------------------------------------------------------------------------------
class Panic(BaseException):
    pass


@pytest.mark.parametrize("error", [Panic, GeneratorExit, SystemExit, RuntimeError])
@pytest.mark.parametrize("method", ["prepare", "setup", "reset", "reindex", "prefix", "complete", "logw_next"])
def test_whatever_is_raised_ends_the_group(drivers, method, error):
    class Bad(Scribbler):
        pass

    def raises(self, *args):
        if getattr(args[0], "step", 1) == (2 if method == "complete" else 1):
            raise error("boom")
        return getattr(Scribbler, method)(self, *args)

    setattr(Bad, method, raises)
    proposal = "base" if method == "prefix" else "twisted"
    params = SMCParams(n_particles=4, max_tokens=2, proposal=proposal, ess_threshold=1.0)
    with pytest.raises(SMCError, match=rf"Bad\.{method}.*{error.__name__}: boom"):
        drivers["hf"](params, Bad(False))
    if method not in ("prepare", "setup"):
        with pytest.raises(SMCError, match=rf"Bad\.{method} at step \d.*{error.__name__}: boom"):
            drivers["captured"](params, Bad(False))


def test_an_interrupt_is_the_users(drivers):
    class Interrupted(Zero):
        def prefix(self, state):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drivers["hf"](SMCParams(n_particles=2, max_tokens=2), Interrupted())


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("driver", ["hf", "captured"])
def test_errors_name_the_step_that_the_potential_saw(drivers, driver, proposal):
    """The last step whose number each method was shown before it raised is the one in the message."""

    for method in ("prefix", "complete", "logw_next"):
        if (method, proposal) in (("prefix", "twisted"), ("logw_next", "base")):
            continue
        for step in range(STEPS + 1):

            def raises(self, state, method=method, step=step):
                if int(state.step) == step:
                    raise RuntimeError("boom")
                return getattr(Scribbler, method)(self, state)

            Bad = type("Bad", (Scribbler,), {method: raises})
            params = SMCParams(n_particles=8, max_tokens=STEPS, proposal=proposal, seed=step)
            try:
                drivers[driver](params, Bad(False))
            except SMCError as error:
                assert f"Bad.{method} at step {step}:" in str(error)
            else:
                assert (method, step) in {
                    ("complete", 0),
                    ("prefix", STEPS),
                    ("logw_next", STEPS),
                } or method == "complete"
