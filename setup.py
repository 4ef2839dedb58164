"""Builds the extension `fastsmc._C` (the CPU backend); everything else about the package is in pyproject.toml.

FASTSMC_MARCH overrides the CPU that code is made for (default: native, the machine that builds).
"""

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HERE = Path(__file__).parent
HEADERS = sorted(
    str(p.relative_to(HERE)) for pattern in ("*.hpp", "include/fastsmc/*.cuh") for p in (HERE / "csrc").glob(pattern)
)

setup(
    ext_modules=[
        Pybind11Extension(
            "fastsmc._C",
            ["csrc/bindings.cpp", "csrc/cpu.cpp"],
            include_dirs=["csrc/include", "csrc"],
            depends=HEADERS,
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
    cmdclass={"build_ext": build_ext},
)
