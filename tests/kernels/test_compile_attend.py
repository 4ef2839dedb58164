"""Compile-only gates of attend's Triton kernels for an H100 (sm_90), without a GPU or a driver: matrix instructions, no
spills, registers that leave two programs a multiprocessor."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastsmc.kernels import attend  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel, types, constants, options):
    """(registers, spilled bytes, SASS); pointers and strides divisible by 16."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs = {(i,): constants.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") or name.endswith("_stride")) and name not in kernel.do_not_specialize
    }
    binary = triton.compile(
        ASTSource(kernel, signature, constexprs, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, sass


SHAPES = [(128, 4, 16), (64, 3, 16), (64, 3, 32), (64, 3, 80), (256, 8, 64), (80, 1, 16)]
TYPES = [("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp8e4nv")]


@pytest.mark.parametrize(
    ("shape", "types", "several"),  # every pair of two of them
    [(shape, types, (i + k) % 2 == 1) for i, shape in enumerate(SHAPES) for k, types in enumerate(TYPES)],
)
def test_tiles(shape, types, several):
    (dim, group, size), (dtype, cache) = shape, types
    types = {"query": f"*{dtype}", "keys": f"*{cache}", "values": f"*{cache}", "scale": "fp32", "n_rows": "i32"}
    types |= {"out": "*fp32", "lse": "*fp32"} if several else {"out": f"*{dtype}"}
    types |= dict.fromkeys(("key_scale", "value_scale"), "*fp32") if cache != dtype else {}
    types |= dict.fromkeys(("table", "order", "spans", "length"), "*i32")
    strides = (
        "query_stride",
        "block_stride",
        "head_stride",
        "token_stride",
        "table_stride",
        "length_stride",
        "out_stride",
    )
    types |= dict.fromkeys(strides, "i32")
    constants = dict(HEADS=8 * group, WIDE=False, **attend.tile_shape(group, size, dim))
    registers, spilled, sass = compiled(attend.tiles, types, constants, attend.LAUNCH)
    # widening float8 costs a few: up to 32 bytes with Triton 3.9, 64 with 3.6, which vLLM 0.32 brings on a GPU
    assert spilled <= (0 if cache == dtype else 64) and registers <= 255
    assert re.search(r"\bH?GMMA\.|\bHMMA\.", sass)
    assert re.search(r"\bLDG(?:STS)?\.E(?:\.\w+)*\.128\b", sass)


def test_merge():
    types = {"parts": "*fp32", "lse": "*fp32", "out": "*bf16", "out_stride": "i32", "n_rows": "i32", "n_parts": "i32"}
    constants = {"HEADS": 32, "DIM": 128, "DIMS": 128}
    registers, spilled, _ = compiled(attend.merge, types, constants, {"num_warps": 1, "enable_fp_fusion": False})
    assert spilled == 0 and registers <= 64
