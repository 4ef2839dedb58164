"""Builds the extension `fastsmc._C`; everything else about the package is in pyproject.toml.

It has the CPU backend, and the CUDA backend where there is a CUDA compiler. Environment:

    FASTSMC_MARCH        the CPU that code is made for (default: native, the machine that builds)
    FASTSMC_BUILD_CUDA   unset: with CUDA if an nvcc in CUDA_HOME or on PATH works; 0: without; 1: with, or fail
    FASTSMC_CUDA_ARCHS   what nvcc compiles for (default: 80,90,100); PTX of the last goes along
"""

import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HERE = Path(__file__).parent
SOURCES = ["csrc/bindings.cpp", "csrc/cpu.cpp"]
CUDA_SOURCE = "csrc/cuda.cu"
HEADERS = sorted(
    str(p.relative_to(HERE)) for pattern in ("*.hpp", "include/fastsmc/*.cuh") for p in (HERE / "csrc").glob(pattern)
)
INCLUDE = ["csrc/include", "csrc"]


class NoCuda(RuntimeError):
    """CUDA code cannot be built here."""


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        raise NoCuda(f"there is no nvcc in CUDA_HOME={home}" if home else "there is no nvcc on PATH, and no CUDA_HOME")
    return nvcc


def cuda_archs() -> list[int]:
    text = os.environ.get("FASTSMC_CUDA_ARCHS", "80,90,100")
    if not re.fullmatch(r"[1-9]\d+(,[1-9]\d+)*", text):
        raise SystemExit(f"FASTSMC_CUDA_ARCHS={text!r}: must be numbers such as 80,90,100")
    return [int(arch) for arch in text.split(",")]


def nvcc_command(nvcc: str, archs: list[int], *arguments: str) -> list[str]:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    host = "-fPIC,-fvisibility=hidden"
    return [nvcc, "-std=c++17", "-O3", "--threads=0", "-cudart=static", f"-Xcompiler={host}", *codes, *arguments]


def run(command: list[str]) -> str:
    """Runs a command and gives its standard output and error; NoCuda if it fails."""
    try:
        done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise NoCuda(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        raise NoCuda(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def check_cuda(nvcc: str, archs: list[int]) -> list[str]:
    """Compiles and links a trivial kernel, and gives the folders of the static runtime; NoCuda if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trivial.cu")
        source.write_text("__global__ void kernel() {}\nvoid launch() { kernel<<<1, 1>>>(); }\n")
        command = nvcc_command(nvcc, archs, "-shared", str(source), "-o", str(source.with_suffix(".so")))
        run(command)
        libraries = re.search(r"^#\$ LIBRARIES=(.*)$", run([*command, "--dryrun"]), re.MULTILINE)
    folders = re.findall(r'-L"?([^"\s]+)', libraries[1]) if libraries else []
    return [f for f in folders if Path(f, "libcudart_static.a").exists()]


def find_cuda() -> tuple[str, list[int], list[str]] | None:
    """Finds nvcc, architectures and library folders; None to build without CUDA."""
    wish = os.environ.get("FASTSMC_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FASTSMC_BUILD_CUDA={wish!r}: must be 0, 1 or unset")
    if wish == "0":
        return None
    archs = cuda_archs()
    try:
        nvcc = find_nvcc()
        return nvcc, archs, check_cuda(nvcc, archs)
    except NoCuda as error:
        if wish == "1":
            raise SystemExit(f"FASTSMC_BUILD_CUDA=1: {error}") from None
        print(f"fastsmc: built without CUDA: {str(error).splitlines()[0]}")
        return None


class BuildExt(build_ext):
    """build_ext that also compiles csrc/cuda.cu with nvcc."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        self.force = True  # objects have the same names with and without CUDA
        if (cuda := find_cuda()) is None:
            return super().build_extension(extension)
        nvcc, archs, folders = cuda
        target = Path(self.build_temp, "cuda.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{HERE / folder}" for folder in INCLUDE]
        try:
            run(nvcc_command(nvcc, archs, *includes, "-c", str(HERE / CUDA_SOURCE), "-o", str(target)))
        except NoCuda as error:
            raise SystemExit(f"csrc/cuda.cu: {error}") from None
        extension.define_macros.append(("FASTSMC_CUDA_ARCHS", ",".join(map(str, archs))))
        extension.extra_objects.append(str(target))
        extension.library_dirs += folders
        extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
        # the runtime's symbols stay inside: torch has a CUDA runtime of its own
        extension.extra_link_args.append("-Wl,--exclude-libs,ALL")
        return super().build_extension(extension)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Pybind11Extension(
                "fastsmc._C",
                SOURCES,
                include_dirs=INCLUDE,
                depends=[*HEADERS, CUDA_SOURCE],
                cxx_std=17,
                extra_compile_args=[
                    "-O3",
                    "-fopenmp",
                    f"-march={os.environ.get('FASTSMC_MARCH', 'native')}",
                    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
                    "-Wno-unknown-pragmas",
                ],
                extra_link_args=["-fopenmp"],
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
