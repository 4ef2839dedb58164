"""Types of the extension `fastsmc._C`, whose source is csrc/bindings.cpp; tests/test_package.py compares the two.

An address is that of `Tensor.data_ptr()`, 0 for null. The extension checks no shape, dtype or index range: fastsmc.ops
does, and nothing else calls it. Arguments are positional.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Address: TypeAlias = int
#: address, row stride in elements, dtype code, address of the row index
MatrixArgs: TypeAlias = tuple[Address, int, int, Address]
#: logits, factual, mask; tokens; rows, vocab; temperature, address of temperatures, and those of factual
PowerArgs = tuple[float, Address, float, Address, bool]
ContrastArgs: TypeAlias = tuple[MatrixArgs, MatrixArgs, MatrixArgs, Address, int, int, float, Address, float, Address]
#: for all groups: seed, group, step, stream; addresses: seeds, groups, steps, offsets; groups
UniformArgs: TypeAlias = tuple[int, int, int, int, Address, Address, Address, Address, int]
#: ten addresses: log_weights, uniforms, ancestors, counts, rank, ess, log_mean, resampled, thresholds, offsets
ResampleArgs: TypeAlias = Sequence[Address]
#: groups, particles in all of them, particles in the largest
ResampleSizes: TypeAlias = Sequence[int]
#: table, row stride, columns; ancestors, rows; position, its address, that of one per row; block size; genealogy,
#: steps, step, its address
ReindexArgs: TypeAlias = tuple[Address, int, int, Address, int, int, Address, Address, int, Address, int, int, Address]
#: address, block stride in bytes, blocks, pieces, bytes per piece, bytes per slot
CacheArgs: TypeAlias = tuple[Address, int, int, int, int, int]
#: address, row stride, rows, columns; address of lengths, block size
TableArgs: TypeAlias = tuple[Address, int, int, int, Address, int]
#: key and value address, block and head stride in elements, block size, head dimension, layout code
KVArgs: TypeAlias = tuple[Address, Address, int, int, int, int, int]
#: x, its row stride, source, its row stride, dtype code
RowsArgs: TypeAlias = tuple[Address, int, Address, int, int]
#: widths of x and of source; addresses: offsets, down, up, shift, finite
MapArgs: TypeAlias = tuple[int, int, Address, Address, Address, Address, Address]

#: tokens per tile of `weigh`
TILE: int
#: how bfloat16 is multiplied: 'tiles' (AMX), 'pairs' (AVX-512 BF16) or 'floats'
BF16_MATH: str
#: compute capabilities that CUDA code was compiled for; empty without the CUDA backend
cuda_archs: tuple[int, ...]

def uniforms(out: Address, n: int, args: UniformArgs, /) -> None: ...
def weigh(
    logits: MatrixArgs,
    psi: MatrixArgs,
    mask: MatrixArgs,
    n_rows: int,
    vocab: int,
    temperature: PowerArgs,
    lse: Address,
    lse_psi: Address,
    tile_mass: Address,
    max_psi: Address,
    /,
) -> None: ...
def draw(
    logits: MatrixArgs,
    psi: MatrixArgs,
    mask: MatrixArgs,
    vocab: int,
    temperature: PowerArgs,
    lse: Address,
    tile_mass: Address,
    rows: Address,
    u: Address,
    n_draws: int,
    tokens: Address,
    log_prob: Address,
    log_psi: Address,
    /,
) -> None: ...
def redraw(
    args: ContrastArgs, u: Address, tokens: Address, stay: Address, log_prob: Address, log_kernel: Address, /
) -> None: ...
def redraw_logits(args: ContrastArgs, out: Address, /) -> None: ...

# keys: seeds, groups, steps, particles
def gumbel(args: ContrastArgs, lse: Address, keys: Sequence[Address], tokens: Address, /) -> None: ...

# index of the first value that is not allowed, −1 if there is none
def intervene(rows: RowsArgs, slots: Address, n_rows: int, map: MapArgs, /) -> None: ...
def bad_log_weight(log_weights: Address, n: int, /) -> int: ...
def bad_uniform(u: Address, n: int, /) -> int: ...
def bad_temperature(temperatures: Address, logit_rows: Address, n: int, /) -> int: ...
def bad_offset(offsets: Address, groups: int, n: int, /) -> int: ...
def bad_threshold(thresholds: Address, n: int, /) -> int: ...
def bad_index(index: Address, n: int, low: int, high: int, where: Address, /) -> int: ...
def bad_position(positions: Address, n: int, most: int, /) -> int: ...
def bad_slot(slots: Address, offsets: Address, groups: int, /) -> int: ...
def bad_size(offsets: Address, groups: int, largest: int, /) -> int: ...
def not_in_place(ancestors: Address, n: int, /) -> int: ...
def bad_tail(args: ReindexArgs, caches: Sequence[CacheArgs], /) -> int: ...
def resample(args: ResampleArgs, sizes: ResampleSizes, scheme: str, threshold: float, /) -> None: ...
def ssp(part: Address, u: Address, n: int, counts: Address, /) -> None: ...
def ess_log_mean(log_weights: Address, n: int, /) -> tuple[float, float]: ...

# out: ancestors, slots, tokens, rows, present, copied
def settle(
    slots: Address, tokens: Address, wanted: Address, offsets: Address, groups: int, out: Sequence[Address], /
) -> None: ...
def reindex(args: ReindexArgs, caches: Sequence[CacheArgs], /) -> None: ...

# rows of (row_begin, row_end, column_begin, column_end), flattened
def plan(table: TableArgs, order: Address, /) -> NDArray[np.int32]: ...

# (nodes, columns) of each group alone, flattened
def count_reads(table: TableArgs, order: Address, offsets: Address, n_groups: int, /) -> NDArray[np.int32]: ...
def attend(
    query: Address,
    query_stride: int,
    out: Address,
    out_stride: int,
    dtype: int,
    n_heads: int,
    n_key_heads: int,
    kv: KVArgs,
    table: TableArgs,
    length: int,
    order: Address,
    nodes: Address,
    n_nodes: int,
    scale: float,
    /,
) -> None: ...

# for tests: what a device runs, thread by thread on the host
def emulate_resample(
    args: ResampleArgs, sizes: ResampleSizes, scheme: str, threshold: float, threads: int, seed: int, /
) -> None: ...
def emulate_reindex(args: ReindexArgs, caches: Sequence[CacheArgs], parts: int, threads: int, seed: int, /) -> None: ...

# The following are there only where `cuda_archs` is not empty. `stream` is the address of a CUDA stream.
def cuda_uniforms(device: int, stream: Address, out: Address, n: int, args: UniformArgs, /) -> None: ...
def cuda_resample_memory(device: int, n: int, /) -> int: ...
def cuda_resample(
    device: int,
    stream: Address,
    args: ResampleArgs,
    sizes: ResampleSizes,
    scheme: str,
    threshold: float,
    memory: Address,
    /,
) -> None: ...
def cuda_reindex(device: int, stream: Address, args: ReindexArgs, caches: Sequence[CacheArgs], /) -> None: ...
