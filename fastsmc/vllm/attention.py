"""Groups' own attention inside vLLM: `attend` where it is worth it, vLLM's kernels for everything else.

    register()         before the model is loaded: vLLM's backends, under their own names, become the subclasses of
                       `BACKENDS`: its CPU backend, on a CUDA device FlashAttention and Triton (attention_gpu.py)
    Attend(layers)     after that: says whether and how `attend` can run on this model
    .measure(...)      at start-up, where fastsmc/vllm/attend_costs.json does not say when it pays on such a machine
    .plan(...)         once for a table: who reads what together
    .pays(...)         per step: whether it is faster than vLLM's attention; .metadata(...) then is what the layers get
    AttendImpl         per layer: runs `attend` if the metadata is ours, vLLM's own forward if not

Ordinary requests never see any of it: their metadata is vLLM's, and so is the code that they run.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm import _custom_ops, envs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from fastsmc import ops
from fastsmc.ops.attend import LANES, LAYOUTS, AttendPlan
from fastsmc.vllm import attend_costs, compat
from fastsmc.vllm.compat import get_logger

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl as _VllmImpl
else:
    _VllmImpl = object  # which of vLLM's comes after `AttendImpl` among the bases of each of ours

logger = get_logger(__name__)

#: device type → vLLM's name of a backend → ours. Strings: what a backend imports need not be there on another device
BACKENDS = {
    "cpu": {"CPU_ATTN": f"{__name__}.AttendCPUBackend"},
    "cuda": {
        "FLASH_ATTN": f"{__name__}_gpu.AttendFlashBackend",
        "TRITON_ATTN": f"{__name__}_gpu.AttendTritonBackend",
    },
}


@dataclass(frozen=True)
class AttendMetadata:
    """Attention metadata of groups' rows, one query each; the same for every layer.

    Attributes:
        length: tokens of each row, as ops.attend takes it; for a plan of 'triton' (1,) or (R,) int32 on the device.
    """

    plan: AttendPlan
    length: int | Tensor
    layout: str


@dataclass(frozen=True)
class MixedMetadata:
    """Attention metadata of a batch of which some rows use `attend` and others vLLM's attention.

    Attributes:
        parts: (begin, end, metadata) of the tokens [begin, end) of the batch; metadata is vLLM's or `AttendMetadata`.
            Tokens outside all parts are padding.
    """

    parts: tuple[tuple[int, int, Any], ...]


class AttendImpl(_VllmImpl):
    """Attends for rows that come with `AttendMetadata`, and leaves all others to vLLM's own forward; a batch that comes
    with `MixedMetadata` is both, part by part.

    Our implementations inherit from this first, then from one of vLLM's.

    Attributes:
        backend: the backend of ops.plan_attend and ops.attend.
        num_kv_heads: vLLM's, of every implementation.
    """

    backend: str
    num_kv_heads: int

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(attn_metadata, MixedMetadata):
            for begin, end, metadata in attn_metadata.parts:
                q, k, v = (t if t is None else t[begin:end] for t in (query, key, value))
                self.forward(layer, q, k, v, kv_cache, metadata, output[begin:end], *args, **kwargs)
            return output
        if not isinstance(attn_metadata, AttendMetadata):
            stock = super().forward  # type: ignore[safe-super]  # of the implementation that comes next in the bases
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if any(scale is not None for scale in (*args, *kwargs.values())):  # `Attend` has refused the model
            raise NotImplementedError("attend does not quantise its output")
        n_rows = len(attn_metadata.plan.table)  # the batch may be padded
        self.attend(layer, query[:n_rows], kv_cache, attn_metadata, output[:n_rows].view(n_rows, *query.shape[1:]))
        return output

    def attend(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: AttendMetadata, out: Tensor) -> None:
        """Runs ops.attend of queries (R, Hq, D) over a layer's cache, into `out` of their shape."""
        raise NotImplementedError

    @staticmethod
    def unknown(layers: Sequence[Any]) -> dict[str, bool]:
        """Names what `attend` would do wrong, each with whether these layers have it."""
        raise NotImplementedError

    @staticmethod
    def find_layout(layer: Any) -> str | None:
        """Finds how vLLM lays the cache out, as one of ops.attend's layouts; None if it is none of them."""
        raise NotImplementedError

    @staticmethod
    def cost_key(layer: Any) -> str:
        """Names what costs depend on beside the shapes: the kernels, vLLM's and ours, and the dtypes."""
        raise NotImplementedError


class AttendCPUImpl(AttendImpl, CPUAttentionBackendImpl):
    """Attends by vLLM's CPU kernels, or by `attend` in C++."""

    backend = "cpu"

    def attend(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: AttendMetadata, out: Tensor) -> None:
        ops.attend(
            query,
            *split_cache(kv_cache),
            metadata.plan,
            metadata.length,
            scale=self.scale,
            layout=metadata.layout,
            out=out,
        )

    @staticmethod
    def unknown(layers: Sequence[Any]) -> dict[str, bool]:
        impl, block_size = layers[0].impl, layers[0].kv_cache.shape[2]
        return {
            "a sliding window": any(layer.impl.sliding_window != -1 for layer in layers),
            "a quantised KV cache": any(layer.impl.is_fp8_kv_cache for layer in layers),
            f"a head size of {impl.head_size}": impl.head_size % LANES != 0,
            f"a block size of {block_size}": block_size % LANES != 0,
            "attention layers that differ": len({layer.isa for layer in layers}) > 1,
        }

    @staticmethod
    def find_layout(layer: Any) -> str | None:
        return find_layout(layer.isa, layer.kv_cache.dtype, layer.kv_cache.shape[2], layer.impl.head_size)

    @staticmethod
    def cost_key(layer: Any) -> str:
        return attend_costs.cost_key(layer.isa, layer.kv_cache.dtype)


class AttendCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[AttendCPUImpl]:
        return AttendCPUImpl


def register() -> None:
    """Puts our subclasses in the place of vLLM's backends, for models loaded in this process from now on."""
    for name, path in BACKENDS.get(current_platform.device_type, {}).items():
        register_backend(AttentionBackendEnum[name], path)
    _cached_get_attn_backend.cache_clear()  # an engine that started earlier in this process


class Attend:
    """Says whether `attend` can run on a model, and when it pays.

    Args:
        layers: vLLM's attention layers, once their KV cache is there.
        fused_output: whether vLLM may ask attention for an output that is quantised already.

    Attributes:
        why_not: why groups use vLLM's own attention here; None where `attend` can run.
        backend: the backend of ops.plan_attend.
        shape: the shape of the layers.
        layout: the layout of their KV cache, one of ops.attend's.
        costs: what `pays` decides by. The committed ones; None if there are none, until `measure` finds some.
    """

    def __init__(self, layers: Sequence[Any], fused_output: bool = False) -> None:
        self.why_not: str | None = None
        layer = layers[0]
        if not isinstance(layer.impl, AttendImpl):
            self.why_not = f"no kernel for {type(layer.impl).__name__}"
            return
        impl, cache = layer.impl, layer.kv_cache
        self.shape = attend_costs.Shape(impl.num_heads, impl.num_kv_heads, impl.head_size, cache.shape[2])
        self.backend = impl.backend
        impls = [layer.impl for layer in layers]
        kinds = {
            (type(layer.impl), layer.kv_cache.shape, layer.kv_cache.dtype, layer.impl.kv_cache_dtype)
            for layer in layers
        }
        for name, found in {
            "attention that is not a decoder's": any(impl.attn_type != AttentionType.DECODER for impl in impls),
            "ALiBi": any(impl.alibi_slopes is not None for impl in impls),
            "a soft cap of logits": any(impl.logits_soft_cap for impl in impls),
            "attention sinks": any(impl.sinks is not None for impl in impls),
            "attention layers that differ": len(kinds) > 1,
            "a quantised output (fuse_attn_quant)": fused_output,
            **impl.unknown(layers),
        }.items():
            if found:
                self.why_not = f"attend does not know {name}"
                return
        self._key = impl.cost_key(layer)
        if (layout := impl.find_layout(layer)) is None:
            self.why_not = f"attend does not know the KV layout of vLLM's kernels for {self._key!r}"
            return
        self.layout = layout
        self.costs = attend_costs.committed(self._key)

    def measure(
        self,
        layers: Mapping[str, Any],
        stock_metadata: Callable[[Tensor, int], Mapping[str, Any]],
        max_rows: int,
        max_length: int,
    ) -> None:
        """Sets costs that are not committed: from the user's cache, or by timing the forward of the layers.

        Timing only reads the KV caches, in which no request has written yet. It takes the layers one after the other,
        as a step does, so that a layer's keys and values have left the processor's cache when its turn comes again.

        Args:
            layers: vLLM's attention layers by name, all of one shape.
            stock_metadata: makes vLLM's metadata by layer from (block table, length).
            max_rows, max_length: the most that a group can have in this engine.
        """
        first, shape = next(iter(layers.values())), self.shape
        cache, dtype, device = first.kv_cache, first.dtype, first.kv_cache.device
        if cache.dtype != dtype:  # its queries come quantised, which only vLLM's layer does
            logger.warning("attend is not used: there are no costs of %s", self._key)
            return
        cases = attend_costs.candidates(max_rows, max_length, len(cache), shape.block_size)

        def measure() -> attend_costs.Costs | None:
            start = time.perf_counter()
            synchronize = torch.cuda.synchronize if device.type == "cuda" else None
            try:
                costs = attend_costs.measure(
                    cases, functools.partial(self._time_case, layers, stock_metadata), shape, synchronize
                )
            except Exception:  # say a kernel that needs more shared memory than this GPU has
                logger.exception("attend: a case of %s could not be timed", self._key)
                return None
            spent = time.perf_counter() - start
            logger.info("attend: costs of %s measured in %.1f s: %s", self._key, spent, costs)
            return costs

        threads = torch.get_num_threads() if device.type == "cpu" else 0
        key = {
            "device": attend_costs.device_name(device), "threads": threads, "kernels": self._key, **shape._asdict(),
            "cases": f"{len(cases)} to {cases[-1:]}", "vllm": compat.vllm_version(), "recipe": attend_costs.RECIPE,
        }  # fmt: skip
        self.costs = attend_costs.kept(", ".join(f"{name} {value}" for name, value in key.items()), measure)
        if self.costs is None:
            logger.warning("attend is not used: too few cases could be timed in this engine to know what it costs")

    def _time_case(
        self,
        layers: Mapping[str, Any],
        stock_metadata: Callable[[Tensor, int], Mapping[str, Any]],
        table: Tensor,
        length: int,
    ) -> attend_costs.Timed:
        """Makes the calls that `measure` times for a table (R, C) whose rows have `length` tokens."""
        layer, shape = next(iter(layers.values())), self.shape
        known_shared = int((table == table[:1]).all(0).long().cumprod(0).sum())
        table = table.to(layer.kv_cache.device)
        plan, theirs = self.plan(table, known_shared), stock_metadata(table, length)
        like: dict[str, Any] = {"dtype": layer.dtype, "device": table.device}
        query = torch.ones(len(table), shape.heads, shape.head_size, **like)
        key = torch.ones(len(table), shape.key_heads, shape.head_size, **like)
        out = torch.empty_like(query)

        def forward(metadata: Mapping[str, Any], first: int) -> Callable[[], None]:
            turn = itertools.cycle([*layers.items()][first:] + [*layers.items()][:first])

            def call() -> None:
                name, layer = next(turn)
                layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata[name], out)

            return call

        ours = forward(dict.fromkeys(layers, self.metadata(plan, length)), 0)
        stock = forward(theirs, len(layers) // 2)  # far from what ours has just read
        return attend_costs.Timed(ours, stock, plan.n_reads, plan.n_nodes)

    def warm_up(self, layer: Any) -> None:
        """Calls `attend` on a layer's cache with tokens in one part and in two, which is all that Triton compiles."""
        dtype, device = layer.dtype, layer.kv_cache.device
        query = torch.zeros(1, self.shape.heads, self.shape.head_size, dtype=dtype, device=device)
        for columns in (1, 2):
            plan = self.plan(torch.zeros(1, columns, dtype=torch.int32, device=device), columns)
            metadata = self.metadata(plan, columns * self.shape.block_size)
            layer.impl.attend(layer, query, layer.kv_cache, metadata, torch.empty_like(query))

    def plan(
        self,
        table: Tensor,
        known_shared: int | Sequence[int],
        lengths: Tensor | None = None,
        offsets: Sequence[int] | Tensor | None = None,
    ) -> AttendPlan:
        """Plans a table, as ops.plan_attend does."""
        size = None if lengths is None else self.shape.block_size
        return ops.plan_attend(
            table,
            lengths=lengths,
            block_size=size,
            offsets=offsets,
            backend=self.backend,
            known_shared=known_shared,
        )

    def metadata(self, plan: AttendPlan, length: int | Tensor) -> AttendMetadata:
        """Makes the metadata for the rows of a plan: `length` tokens each, or (R,) int32 on the plan's device."""
        if plan.backend != "triton":
            return AttendMetadata(plan, length, self.layout)
        if not isinstance(length, Tensor):  # a number would be written to the device once per layer
            length = torch.full((1,), length, dtype=torch.int32, device=plan.table.device)
        return AttendMetadata(plan, length, "plain")

    def may_pay(self, n_rows: int, length: int) -> bool:
        """Says whether `attend` could be the faster for so many rows, if they shared all blocks but the last."""
        if self.costs is None:
            return False
        n_reads = n_rows + (length - 1) // self.shape.block_size
        return attend_costs.pays(self.costs, attend_costs.features(n_rows, length, n_reads, n_rows + 1, self.shape))

    def pays(self, plan: AttendPlan, length: int | Tensor, group: int | None = None) -> bool:
        """Says whether `attend` is the faster for all rows of a plan, or for those of a group as if they were alone.

        Args:
            length: tokens of each of these rows: one number, or a vector that the host knows.
            group: a choice by it does not depend on the group's neighbours. The host must know the plan's offsets.
        """
        if self.costs is None:
            return False
        if group is None:
            counts = len(plan.table), plan.n_reads, plan.n_nodes
        elif plan.group_rows is None or plan.group_reads is None or plan.group_nodes is None:
            raise ValueError(f"group={group}: the offsets of the plan are known to its device only")
        else:
            counts = plan.group_rows[group], plan.group_reads[group], plan.group_nodes[group]
        n_rows, n_reads, n_nodes = counts
        mean = float(length.double().mean()) if isinstance(length, Tensor) else length
        return attend_costs.pays(self.costs, attend_costs.features(n_rows, mean, n_reads, n_nodes, self.shape))


@contextmanager
def rows_read_whole() -> Iterator[None]:
    """Has vLLM's CPU kernels read the keys of a row one after the other, by metadata that is built meanwhile.

    Otherwise they split long rows among threads that have nothing else to do, and a row's bits hang on those beside it.
    """
    envs.VLLM_CPU_ATTN_SPLIT_KV = False  # hides what the module would make of the environment
    try:
        yield
    finally:
        del envs.VLLM_CPU_ATTN_SPLIT_KV


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Splits vLLM's CPU cache (n_blocks, Hk, B, 2 D), in which a block's keys come before its values, into keys and
    values (n_blocks, Hk, B, D)."""
    n_blocks, n_key_heads, block_size, width = kv_cache.shape
    keys, values = kv_cache.view(n_blocks, n_key_heads, 2 * block_size, width // 2).chunk(2, dim=2)
    return keys, values


def find_layout(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> str | None:
    """Finds the layout of what vLLM's cache writer for `isa` writes, by letting it write; None: `attend` lacks it."""
    cache = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
    keys, values = split_cache(cache)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(block_size, 1, head_size, generator=generator).to(dtype) for _ in range(2))
    _custom_ops.cpu_attn_reshape_and_cache(key, value, keys, values, torch.arange(block_size), isa)
    for layout in LAYOUTS:
        written = [t.reshape(-1) for t in (keys, values)]
        if all(
            torch.equal(got, want) for got, want in zip(written, lay_out(key[:, 0], value[:, 0], layout), strict=True)
        ):
            return layout
    return None


def lay_out(key: Tensor, value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Lays keys and values (B, D) of one block out as they lie in memory, flat."""
    tokens, dims = key.shape
    if layout == "tiled":
        key = key.view(tokens // LANES, LANES, dims // 2, 2).transpose(1, 2)
        value = value.view(tokens // 2, 2, dims // LANES, LANES).permute(2, 0, 3, 1)
    elif layout == "vector":
        key = key.t()
    return key.reshape(-1), value.reshape(-1)
