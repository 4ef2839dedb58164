"""The CUDA half of the extension where there is no GPU: what nvcc makes of the kernels, how it is built, how it fails.

The gates look at machine code for sm_90: from fastsmc._C, if that was built with CUDA, else compiled here.
"""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from fastsmc import _C

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("uniforms_kernel", "resample_block_kernel", "resample_grid_kernel", "reindex_kernel")


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastsmc_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")  # ships one
    path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(path) if path and path.exists() else None


@pytest.fixture(scope="module")
def dump(build, tmp_path_factory):
    """dump(option): what cuobjdump says of the sm_90 kernels."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump: from CUDA or the triton package")
    if 90 in _C.cuda_archs:
        target = [_C.__file__, "-arch", "sm_90"]
    else:
        try:
            nvcc = build.find_nvcc()
        except build.NoCuda as error:
            pytest.skip(f"needs nvcc, or fastsmc._C built for sm_90: {error}")
        cubin = tmp_path_factory.mktemp("cuda") / "cuda.cubin"
        include = [f"-I{ROOT / folder}" for folder in build.INCLUDE]
        options = ["-std=c++17", "-O3", "-arch=sm_90", "-cubin", *include]
        build.run([nvcc, *options, str(ROOT / build.CUDA_SOURCE), "-o", str(cubin)])
        target = [str(cubin)]

    def read(option: str) -> str:
        return subprocess.run([cuobjdump, option, *target], check=True, capture_output=True, text=True).stdout

    return read


def by_kernel(text: str, start: str) -> dict[str, list[str]]:
    """The parts of a dump that belong to each kernel's instances; `start` matches the line with a mangled name."""
    parts = re.split(start, text)
    found: dict[str, list[str]] = {kernel: [] for kernel in KERNELS}
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        found[next(k for k in KERNELS if re.search(rf"\d{k}", name))].append(part)
    assert [len(found[k]) for k in KERNELS] == [1, 1, 1, 2]
    return found


@pytest.mark.parametrize(
    "kernel, most",
    [("uniforms_kernel", 32), ("resample_block_kernel", 128), ("resample_grid_kernel", 255), ("reindex_kernel", 64)],
)
def test_registers_without_spills(dump, kernel, most):
    """Registers for 512 threads of resample_block and 256 of the others; of reindex, for four blocks at a time."""
    for usage in by_kernel(dump("-res-usage"), r"Function (\S+):\n")[kernel]:
        registers, stack, local = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
        assert registers <= most
        assert stack == 0 and local == 0


def test_machine_code(dump):
    """Blocks are copied by 16-byte accesses; nothing goes through local memory, which is where spills would be."""
    code = by_kernel(dump("-sass"), r"Function : (\S+)\n")
    for reindex in code["reindex_kernel"]:
        assert reindex.count("LDG.E.128") >= 4 and reindex.count("STG.E.128") >= 4
    for kernel in KERNELS:
        assert not any(re.search(r"\b(LDL|STL)\b", part) for part in code[kernel]), kernel
    assert "LDS" in code["resample_block_kernel"][0]  # its scratch is known to be shared memory


@pytest.mark.skipif(not _C.cuda_archs, reason="fastsmc._C was built without CUDA")
def test_module_stands_alone():
    """No CUDA library is needed to import it."""
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert "NEEDED" in dynamic and "libcuda" not in dynamic
    symbols = subprocess.run(["nm", "-D", "--defined-only", _C.__file__], check=True, capture_output=True, text=True)
    assert not re.search(r"\bcuda[A-Z]", symbols.stdout)  # torch's runtime and ours do not meet


@pytest.mark.skipif(not _C.cuda_archs or torch.cuda.is_available(), reason="needs a CUDA build and no GPU")
def test_calls_without_a_driver_say_so():
    with pytest.raises(RuntimeError, match=r"CUDA: cudaSetDevice: .+ \(error \d+\)"):
        _C.cuda_uniforms(0, 0, 0, 8, (0, 0, 0, 0, 0, 0, 0, 0, 1))
    with pytest.raises(RuntimeError, match="CUDA: "):
        _C.cuda_resample_memory(0, 100)


@pytest.mark.skipif(bool(_C.cuda_archs), reason="fastsmc._C was built with CUDA")
def test_backend_that_was_not_built():
    from fastsmc.ops._tensors import pick_backend

    assert pick_backend(None, torch.device("cuda"), "cuda") == "torch"
    with pytest.raises(ValueError, match="backend='cuda': fastsmc._C was built without CUDA"):
        pick_backend("cuda", torch.device("cuda"), "cuda")


# -- setup.py ----------------------------------------------------------------------------------------------------------
def test_build_without_nvcc(build, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.delenv("FASTSMC_BUILD_CUDA", raising=False)
    assert build.find_cuda() is None
    assert "built without CUDA: there is no nvcc in CUDA_HOME=/nonexistent" in capsys.readouterr().out
    monkeypatch.setenv("FASTSMC_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTSMC_BUILD_CUDA=1: there is no nvcc in CUDA_HOME=/nonexistent"):
        build.find_cuda()
    monkeypatch.setenv("FASTSMC_BUILD_CUDA", "0")
    assert build.find_cuda() is None


def test_build_with_an_nvcc_that_does_not_work(build, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho no licence >&2\nexit 3\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("FASTSMC_BUILD_CUDA", raising=False)
    assert build.find_cuda() is None
    monkeypatch.setenv("FASTSMC_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="no licence"):
        build.find_cuda()


@pytest.mark.parametrize("name, value", [("FASTSMC_BUILD_CUDA", "yes"), ("FASTSMC_CUDA_ARCHS", "sm_90")])
def test_build_refuses(build, monkeypatch, name, value):
    monkeypatch.setenv("FASTSMC_BUILD_CUDA", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name}='{value}': must be"):
        build.find_cuda()


@pytest.mark.skipif(shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ, reason="needs nvcc")
def test_build_with_nvcc(build, monkeypatch):
    monkeypatch.setenv("FASTSMC_BUILD_CUDA", "1")
    monkeypatch.setenv("FASTSMC_CUDA_ARCHS", "90")
    nvcc, archs, folders = build.find_cuda()
    assert archs == [90] and Path(nvcc).name == "nvcc"
    assert all(Path(folder, "libcudart_static.a").exists() for folder in folders)
    command = build.nvcc_command(nvcc, [80, 90])
    assert command[-3:] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
