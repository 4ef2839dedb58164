"""Compile-only gates of the Triton kernels for an H100 (sm_90), without a GPU or a driver.

Each kernel is compiled for every data type, with and without twist and mask, with the committed configuration. Then:
registers within what leaves enough warps resident, no spills, and 128-bit loads of all that is streamed.
"""

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

from fastsmc.kernels import draw, intervene, launch, redraw, weigh  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
TILE = weigh.TILE.value

dtypes = pytest.mark.parametrize("dtype", POINTERS)
psi_dtypes = pytest.mark.parametrize("psi", [None, "float32", "bfloat16"])
masks = pytest.mark.parametrize("masked", [False, True])


def compiled(kernel, given, constants, op, num_warps=1):
    """(registers, spilled bytes, SASS). given: name → type; of the kernel's other parameters, constants, else None.
    An op without a configuration has `num_warps`.

    Pointers and integers are divisible by 16, as they are where the vocabulary is.
    """
    names = kernel.arg_names
    signature = {name: given.get(name, "constexpr") for name in names}
    constexprs = {(i,): constants.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32") and name not in kernel.do_not_specialize
    }
    options = launch._configs()["default"][op]["*"] if op else {"num_warps": num_warps}
    options = {"enable_fp_fusion": False, **{k: v for k, v in options.items() if k.startswith("num_")}}
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


def loads(sass, width):
    return len(re.findall(rf"\bLDG\.E(?:\.\w+)*\.{width}\b", sass))


def matrices(dtype, psi, masked):
    """Types of the row arguments that are there."""
    given = {"logits": POINTERS[dtype], "logit_stride": "i32", "logit_rows": "*i64", "vocab": "i32", "n_tiles": "i32"}
    if psi:
        given |= {"psi": POINTERS[psi], "psi_stride": "i32", "psi_rows": "*i64"}
    if masked:
        given |= {"mask": "*i32", "mask_stride": "i32", "mask_rows": "*i64"}
    return given | {"scale": "fp32", "temperatures": "*fp64", "n_temperatures": "i32"}


def powered():
    """Types of the arguments that say what logits are multiplied by in x."""
    return {"powered": "fp32", "powereds": "*fp64", "n_powered": "i32"}


def least_loads(dtype, psi, num_warps):
    """128-bit loads of a thread for one tile."""
    size = SIZES[dtype] + (SIZES[psi] if psi else 0)
    return size * TILE // (16 * 32 * num_warps)


@dtypes
@psi_dtypes
@masks
@pytest.mark.parametrize("power", [False, True])
def test_scan(dtype, psi, masked, power):
    if power and (psi or masked):
        pytest.skip("a power beside a twist or a mask is the same kernel")
    partials = ("maxima", "sums", *(("base_maxima", "base_sums") if psi or masked or power else ()))
    given = matrices(dtype, psi, masked) | powered() | {"tiles": "i32"} | dict.fromkeys(partials, "*fp32")
    for once in (True, False):
        registers, spilled, sass = compiled(
            weigh.scan, given, {"LOGITS_ONCE": once, "PSI_ONCE": once and psi is not None}, "weigh"
        )
        # a warp holds a tile, 32 scores a thread, or 64 where base and base + twist are summed. 65536 registers then
        # keep 16, 20 or 32 warps of a multiprocessor at work, with 32 KiB or more on their way to it; two rows of
        # float32 have twice as much per warp, and so 16 warps
        wide = SIZES[dtype] + (SIZES[psi] if psi else 0) == 8
        assert registers <= (128 if masked or wide else 96 if psi or power else 64)
        assert spilled == 0
        # the loop over whole tiles, and the last one
        num_warps = launch._configs()["default"]["weigh"]["*"]["num_warps"]
        assert loads(sass, 128) >= 2 * least_loads(dtype, psi, num_warps)
        assert ("LDG.E.EF.128" in sass) == once


@pytest.mark.parametrize("reweighs", [False, True])
def test_join(reweighs):
    partials = ("maxima", "sums", *(("base_maxima", "base_sums", "lse_psi") if reweighs else ()))
    given = {"logit_rows": "*i64", "n_tiles": "i32"} | dict.fromkeys(partials, "*fp32")
    given |= dict.fromkeys(("lse", "lse_psi", "tile_mass"), "*fp64") | {"max_psi": "*fp32"}
    registers, spilled, _ = compiled(weigh.join, given, {"BLOCK": 128}, None)
    assert registers <= 64 and spilled == 0


@dtypes
@psi_dtypes
@masks
def test_draw(dtype, psi, masked):
    given = matrices(dtype, psi, masked) | powered() | {"rows": "*i64", "tokens": "*i64"}
    given |= dict.fromkeys(("lse", "tile_mass", "uniforms", "log_prob", "log_psi"), "*fp64")
    registers, spilled, sass = compiled(draw.draw_one, given, {"BLOCK": 128}, "draw")
    num_warps = launch._configs()["default"]["draw"]["*"]["num_warps"]
    assert registers <= 128 and spilled == 0
    assert loads(sass, 128) >= least_loads(dtype, psi, num_warps)


@dtypes
@masks
def test_redraw(dtype, masked):
    given = matrices(dtype, None, masked) | {
        "factual": POINTERS[dtype],
        "factual_stride": "i32",
        "factual_rows": "*i64",
    }
    given |= {"factual_scale": "fp32", "factual_temperatures": "*fp64", "n_factual_temperatures": "i32"}
    given |= dict.fromkeys(("lse", "factual_lse", "uniforms", "stay", "log_prob", "log_kernel", "left"), "*fp64")
    given |= {"max_psi": "*fp32", "factual_max": "*fp32"} | dict.fromkeys(("token_of", "tokens", "bins"), "*i64")
    registers, spilled, sass = compiled(redraw.redraw_one, given, {"BLOCK": 128}, "redraw")
    assert registers <= 168 and spilled == 0  # 12 warps of a multiprocessor
    # both rows, in each of three passes and for the token's tile
    num_warps = launch._configs()["default"]["redraw"]["*"]["num_warps"]
    assert loads(sass, 128) >= 4 * 2 * least_loads(dtype, None, num_warps)


def test_integrate():
    given = dict.fromkeys(("stay", "log_kernel", "left"), "*fp64") | {"bins": "*i64"}
    registers, spilled, _ = compiled(redraw.integrate, given, {}, "integrate")
    assert registers <= 255 and spilled == 0


@dtypes
@pytest.mark.parametrize("finite", [False, True])
def test_intervene(dtype, finite):
    """Rows of 8192, as in models of 70 billion parameters, that read an inner layer of 32768."""
    given = {"x": POINTERS[dtype], "source": POINTERS[dtype], "slots": "*i64", "offsets": "*i64"}
    given |= dict.fromkeys(("down", "up", "shift"), "*fp32") | ({"finite": "*i8"} if finite else {})
    given |= dict.fromkeys(("x_stride", "source_stride", "width", "source_width"), "i32")
    for block, source_block in ((4096, 4096), (8192, 32768)):
        constants = {"BLOCK": block, "SOURCE_BLOCK": source_block}
        registers, spilled, sass = compiled(
            intervene.intervene_row, given, constants, None, num_warps=intervene.warps(block, source_block)
        )
        assert registers <= 128 and spilled == 0
        assert loads(sass, 128) >= 3 * block // (4 * 32 * 16)  # shift, up, down, of which a thread takes four at a time
