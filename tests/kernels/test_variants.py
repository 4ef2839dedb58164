"""How many variants of the Triton kernels a running engine compiles: those of its warm-up, whatever groups ask for.

The kernels are not run. What a launch would be compiled for is made of its arguments by Triton's own rules: values of
constants, data types, what is None, divisibility by 16, integers that are 1. PyTorch computes the results.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter nothing is compiled", allow_module_level=True)

from tiny import TableTwist, value_table  # noqa: E402
from triton._C.libtriton import native_specialize_impl  # noqa: E402
from triton.backends.compiler import BaseBackend  # noqa: E402

from fastsmc import Potential, SMCParams, ops  # noqa: E402
from fastsmc.interventions import BLOCK, DOWN_PROJ, Project, RankOne, Steer  # noqa: E402
from fastsmc.kernels import attend, draw, intervene, redraw, weigh  # noqa: E402
from fastsmc.maps import Maps, lay_out  # noqa: E402
from fastsmc.ops import _torch  # noqa: E402
from fastsmc.potentials import Rows  # noqa: E402
from fastsmc.smc import Group  # noqa: E402
from fastsmc.smc.driving import run_group  # noqa: E402
from fastsmc.smc.evidence import Evidence  # noqa: E402
from fastsmc.vllm import warm_up  # noqa: E402


class Launches:
    """In the place of a kernel: keeps what its launches would be compiled for."""

    def __init__(self, kernel):
        self.kernel, self.variants = kernel, set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | options
        key = [(name, value) for name, value in options.items() if name not in self.kernel.arg_names]
        for p in self.kernel.params:
            rule = (p.is_const, not p.do_not_specialize, not p.do_not_specialize_on_alignment)
            value = values[p.name]
            key.append(value if p.is_constexpr else native_specialize_impl(BaseBackend, value, *rule))
        self.variants.add(tuple(key))


@pytest.fixture
def launches(monkeypatch):
    """Of each kernel; the ops launch them, and then answer as PyTorch operations."""
    found = {}
    of_modules = {
        weigh: ("scan", "join"), draw: ("draw_one",), attend: ("tiles", "merge"), intervene: ("intervene_row",),
        redraw: ("redraw_one", "integrate"),
    }  # fmt: skip
    for module, names in of_modules.items():
        for name in names:
            found[name] = Launches(getattr(module, name))
            monkeypatch.setattr(module, name, found[name])
    for module, op in ((weigh, "weigh"), (draw, "draw"), (redraw, "redraw"), (intervene, "intervene")):
        kernel = getattr(module, op)

        def launch_then_compute(*args, kernel=kernel, op=op):
            kernel(*args)
            return getattr(_torch, op)(*args)

        monkeypatch.setattr(module, op, launch_then_compute)
    for name in ("weigh", "draw", "redraw", "intervene"):
        monkeypatch.setitem(getattr(ops, name).__globals__, "pick_backend", lambda backend, device, gpu: gpu)
    return found


def count(launches):
    return {name: len(kernel.variants) for name, kernel in launches.items() if kernel.variants}


# ------------------------------------------------------------------------------------------------------ weigh and draw
class Logits:
    """A `RowModel` with the dtype and row stride of a model's logits."""

    def __init__(self, dtype, vocab, stride):
        self.all = torch.randn(vocab, stride, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.vocab = vocab

    def first(self):
        return self.all[:1, : self.vocab], None

    def next(self, tokens, slots):
        return self.all[tokens][:, : self.vocab], None

    def reindex(self, ancestors):
        pass


def run(model, params, potential):
    run_group(Group(params, potential, [1], [3]), model)


class Answers(Potential):
    """A twist that answers with `make(n, vocab)`."""

    def __init__(self, make, vocab, proposal_only=False):
        self.make, self.vocab, self.proposal_only = make, vocab, proposal_only

    def logw_next(self, state):
        return self.make(len(state.finished), self.vocab)

    def complete(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


ANSWERS = {
    "dense": lambda n, vocab: torch.zeros(n, vocab),
    "float64": lambda n, vocab: torch.zeros(n, vocab, dtype=torch.float64),
    "one row": lambda n, vocab: Rows(torch.zeros(1, vocab), torch.zeros(n, dtype=torch.int64)),
    "expanded": lambda n, vocab: torch.zeros(vocab).expand(n, -1),
    "rows": lambda n, vocab: Rows(torch.zeros(3, vocab), torch.arange(n) % 3),
    "float16 rows": lambda n, vocab: Rows(torch.zeros(3, vocab, dtype=torch.float16), torch.arange(n) % 3),
}


@pytest.mark.parametrize(
    ("dtype", "vocab", "stride", "scans", "draws"),
    # scan: 1 without row indices; 2 without a twist, 2 with a mask, 2 with a power alone (logits read once or more
    # often), 4 with log ψ of float32, of float16, and with log ψ and a mask (each of the two read once or more often).
    # Of an odd width, a row for all has another stride, 0, than several
    [(torch.bfloat16, 96, 128, 1 + 3 * 2 + 3 * 4, 5), (torch.float32, 1111, 1152, 1 + 3 * 2 + 3 * 4 + 2 * 2, 7)],
)
def test_the_warm_up_compiles_what_groups_launch(launches, dtype, vocab, stride, scans, draws):
    model = Logits(dtype, vocab, stride)
    warm_up.call_ops(model.next(torch.arange(2), None)[0])
    warm = {name: set(kernel.variants) for name, kernel in launches.items()}
    assert count(launches) == {"scan": scans, "join": 3, "draw_one": draws}
    for name, make in ANSWERS.items():
        for n in (1, 2, 5, 16, 33):
            for guided in (False, True):
                run(model, SMCParams(n_particles=n, max_tokens=4, ess_threshold=0.9), Answers(make, vocab, guided))
            assert {k: v.variants - warm[k] for k, v in launches.items() if v.variants - warm[k]} == {}, (name, n)
    for potential in (None, TableTwist(value_table(4, vocab))):
        for proposal in ("base", "twisted"):
            for power in (1.0, 2.0):
                params = SMCParams(n_particles=9, max_tokens=4, proposal=proposal, ess_threshold=1.0, power=power)
                run(model, params, potential)
    temperatures = torch.ones(8, dtype=torch.float64)  # one for all rows or one each, at any address
    logits, rows, u = model.next(torch.arange(2), None)[0], torch.arange(2), torch.zeros(2, dtype=torch.float64)
    for temperature in (temperatures[:2], temperatures[1:3]):
        weighed = ops.weigh(logits, logit_rows=rows, temperature=temperature)
        ops.draw(logits, weighed, rows, u, logit_rows=rows, temperature=temperature)
    assert {name: set(kernel.variants) for name, kernel in launches.items()} == warm


# ------------------------------------------------------------------------------------------------ under interventions
@pytest.mark.parametrize(("dtype", "vocab", "stride"), [(torch.bfloat16, 96, 128), (torch.float32, 1111, 1152)])
def test_the_warm_up_compiles_what_interventions_and_counterfactuals_launch(launches, dtype, vocab, stride):
    model, width, inner = Logits(dtype, vocab, stride), 64, 160
    rows, hidden = model.next(torch.arange(2), None)[0], torch.zeros(2, width, dtype=dtype)
    warm_up.call_ops(rows)
    warm_up.call_intervened(rows, hidden, inner)
    warm = {name: set(kernel.variants) for name, kernel in launches.items()}
    n_dtypes = len({dtype, torch.float32})
    assert [len(warm[name]) for name in ("intervene_row", "redraw_one", "integrate")] == [2, 2 * n_dtypes, 1]
    basis, u, v = torch.eye(width)[:3], torch.ones(width), torch.ones(inner)
    layers = (Project(0, basis), Steer(1, u), RankOne(2, u, v), Project(1, basis[:1]))
    maps = Maps(layers)
    sites = lay_out(dict(enumerate(maps.variants)), len(maps.variants), torch.device("cpu"))
    for (_, place), of in sites.items():
        for n in (1, 3, 16, 40):
            x, variants = torch.zeros(n, width, dtype=dtype), torch.arange(n) % (len(maps.variants) + 1) - 1
            assert place in (BLOCK, DOWN_PROJ)
            for source in (x.new_zeros(n, inner),) if place == DOWN_PROJ else (None, x + x):
                of.apply(x, variants, source)
    for factual in (model.all[:4, :vocab], model.all[:4, :vocab].float()):
        evidence = Evidence(factual.argmax(1).tolist(), 0.9, rows=factual)
        for row in model.all[1:5, :vocab]:
            evidence.compare(row.clone(), 1.0)
        for n in (1, 2, 5, 33):
            run_group(Group(SMCParams(n_particles=n, max_tokens=6), None, [1], [3], evidence=evidence), model)
    assert {name: set(kernel.variants) for name, kernel in launches.items()} == warm


# -------------------------------------------------------------------------------------------------------------- attend
@pytest.mark.parametrize("heads, key_heads, dim, size", [(32, 8, 128, 16), (9, 3, 64, 32), (8, 1, 256, 16)])
def test_attend_has_three_variants_for_all_rows_columns_and_prompts(launches, heads, key_heads, dim, size):
    cache = torch.zeros(4, size, key_heads, 2 * dim, dtype=torch.bfloat16)
    keys, values = (t.transpose(1, 2) for t in cache.split(dim, dim=3))
    length = torch.ones(1, dtype=torch.int32)

    def call(rows, columns, shared):
        table = torch.zeros(rows, columns, dtype=torch.int32)
        order, n_shared = attend.plan(table, (shared,))
        tiles = attend.cut_tiles(rows, n_shared, None, attend.tile_shape(heads // key_heads, size, dim)["ROWS"])
        # as vLLM's queries, one part of what a layer projects at once
        query = torch.zeros(rows, heads + 2 * key_heads, dim, dtype=torch.bfloat16)[:, :heads]
        attend.attend(query, keys, values, table, order, tiles, length, 0.1, torch.empty_like(query).contiguous())

    for columns in (1, 2):  # what Attend.warm_up calls
        call(1, columns, columns)
    warm = {name: set(kernel.variants) for name, kernel in launches.items()}
    assert count(launches) == {"tiles": 2, "merge": 1}
    for rows in (1, 2, 3, 7, 16, 33, 64, 257, 1024, 2000):
        for columns in (1, 2, 3, 5, 8, 15, 16, 17, 31, 48, 130):
            for shared in {0, columns // 2, columns}:
                call(rows, columns, shared)
    assert {name: set(kernel.variants) for name, kernel in launches.items()} == warm
