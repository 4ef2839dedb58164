"""vLLM's attention backends with `attend` put in: what those of all devices have in common, and where each is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from fastsmc.vllm.attention.metadata import AttendMetadata, MixedMetadata

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl as _VllmImpl
else:
    _VllmImpl = object  # which of vLLM's comes after `AttendImpl` among the bases of each of ours

#: device type → vLLM's name of a backend → ours. Strings: what a backend imports need not be there on another device
BACKENDS = {
    "cpu": {"CPU_ATTN": f"{__package__}.cpu.AttendCPUBackend"},
    "cuda": {
        "FLASH_ATTN": f"{__package__}.gpu.AttendFlashBackend",
        "TRITON_ATTN": f"{__package__}.gpu.AttendTritonBackend",
    },
}


def register() -> None:
    """Puts our subclasses in the place of vLLM's backends, for models loaded in this process from now on."""
    for name, path in BACKENDS.get(current_platform.device_type, {}).items():
        register_backend(AttentionBackendEnum[name], path)
    _cached_get_attn_backend.cache_clear()  # an engine that started earlier in this process


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
