"""Runs tests of the ops on Triton's kernels without a GPU: in a process of their own, as Triton decides when it is
imported whether it interprets, and other tests here compile its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process with the interpreter")
def test_on_the_interpreter():
    pytest.importorskip("triton")
    names = ("weigh", "draw", "redraw", "attend", "intervene")
    command = [
        sys.executable,
        *["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-k", "triton"],
        *[HERE / f"test_{name}.py" for name in names],
    ]
    ran = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert ran.returncode == 0, f"on the interpreter:\n{ran.stdout}\n{ran.stderr}"
    for name in names:
        assert any(f"test_{name}.py" in line and " PASSED" in line for line in ran.stdout.splitlines()), name
