"""bench/gpu.sh without a GPU: a stand-in for Python says yes to everything, and keeps what it was asked."""

import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"
PARTS = ("smoke", "ops", "engine", "sanitize", "bench")
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
seen = [os.environ.get(name) for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "PYTHONPATH")]
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps(seen + sys.argv[1:]) + "\\n")
if "get_device_capability" in str(sys.argv):
    print(90)
sys.exit(1 if os.environ.get("FAILS", "nothing") in " ".join(sys.argv) else 0)
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def call(tmp_path):
    """call(parts, **environment): (process, commands that Python was asked for, names in logs.tgz, summary)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "python": STAND_IN,
        "nvidia-smi": "#!/bin/sh\n",
        "compute-sanitizer": '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*parts, **more):
        asked, out = tmp_path / "asked", tmp_path / "out"
        asked.write_text("")
        env = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "ASKED": str(asked),
            "OUT": str(out), "CACHES": str(tmp_path / "caches"),
        }  # fmt: skip
        env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        ran = subprocess.run(["bash", SCRIPT, *parts], env=env | more, capture_output=True, text=True)
        commands = [json.loads(line) for line in asked.read_text().splitlines()]
        names, summary = set(), ""
        if (out / "logs.tgz").exists():
            with tarfile.open(out / "logs.tgz") as tar:
                names = {name.removeprefix("./") for name in tar.getnames()}
                summary = tar.extractfile("./summary.txt").read().decode()
        return ran, commands, names, summary

    return run


def test_all_parts(call):
    ran, commands, names, summary = call(*PARTS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps = dict(line.split(": ", 1) for line in summary.splitlines())
    assert len(steps) == 16 and all(text.startswith("exit 0") for text in steps.values())
    assert names >= {f"{step}.log" for step in steps} | {"machine.log", "summary.txt"}
    assert next(iter(steps)) == "vllm_alone" and [*steps][-1] == "tune"  # the most telling first
    # what the commands name is there
    for _, path, *arguments in commands:
        assert path.split(":")[0] == str(ROOT)
        for argument in arguments:
            if re.match(r"(tests|bench)/", argument):
                file, _, test = argument.partition("::")
                assert (ROOT / file).exists(), argument
                assert f"def {test}" in (ROOT / file).read_text() if test else True, argument
    assert sum("pytest" in arguments for _, _, *arguments in commands) == 3 + 2 + 3
    for multiprocessing, _, script, *_ in commands:
        if re.fullmatch(r"bench/(bench_\w+|tune)\.py", script):
            assert multiprocessing == "1"


def test_what_fails_or_no_longer_fits_is_said(call):
    ran, commands, _, summary = call("smoke", FAILS="--only-vllm")
    assert ran.returncode == 1 and "vllm_alone: exit 1" in summary and "groups_flash: exit 0" in summary
    assert "vllm_alone_v1_runner: exit 1" in summary and "groups_triton_v1_runner" not in summary
    ran, commands, names, summary = call("ops", BUDGET="10")
    assert ran.returncode == 1 and summary.count("NOT RUN") == 3 and "summary.txt" in names
    assert not any("pytest" in arguments for arguments in commands)


@pytest.mark.parametrize("parts", [(), ("smoke", "everything")])
def test_an_unknown_part_is_refused_before_anything_runs(call, parts):
    ran, commands, names, _ = call(*parts)
    assert ran.returncode == 2 and "give one or more of smoke, ops" in ran.stderr and not commands and not names


def test_a_packed_vllm_is_unpacked_once(call, tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "install.sh").write_text('mkdir "$2" && echo "export PYTHONPATH=$2 ANSWER=$1"\n')
    for _ in range(2):
        ran, commands, _, _ = call("ops", BUNDLE=str(bundle))
        assert ran.returncode == 0, ran.stderr
        assert commands[-1][1] == f"{ROOT}:{tmp_path / 'caches' / 'site'}"
