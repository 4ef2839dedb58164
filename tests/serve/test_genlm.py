"""Programs of genlm-control over the engine of a server, in the server's own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_programs_beside_http(letters_model, environment):
    script = Path(__file__).with_name("genlm_beside_http.py")
    done = subprocess.run(
        [sys.executable, str(script), str(letters_model)],
        env={**environment, "VLLM_PLUGINS": "fastsmc"},
        cwd=letters_model,  # where no other metadata of the package lies
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
