"""Runs tests of the ops on Triton's kernels without a GPU: in processes of their own, as
Triton decides when it is imported whether it interprets, and other tests here compile its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process with the interpreter")
@pytest.mark.parametrize(
    "file", ["test_weigh.py", "test_draw.py", "test_redraw.py", "test_attend.py", "test_intervene.py"]
)
def test_on_the_interpreter(file):
    pytest.importorskip("triton")
    command = [
        sys.executable,
        *["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", "triton"],
        HERE / file,
    ]
    ran = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert ran.returncode == 0, f"{file} on the interpreter:\n{ran.stdout}\n{ran.stderr}"
    assert " passed" in ran.stdout
