"""Helper processes that prepare potentials, without an engine."""

import json
import subprocess
import sys
import threading

import numpy
import pytest
from prepared import alive, begun, wait_until
from tiny import TableTwist

from fastsmc.vllm.prepare import MAX_BYTES, PrepareError, Preparer

SLOW, PLAIN = "prepared:Slow", "prepared:Plain"


@pytest.fixture
def preparer():
    preparers = []

    def make(seconds=60.0):
        preparers.append(Preparer(None, seconds))
        return preparers[-1]

    yield make
    for made in preparers:
        made.close()


def args(folder, how="well"):
    return json.dumps({"folder": str(folder), "how": how})


def test_a_helper_serves_on_whatever_a_potential_raises(preparer, tmp_path):
    """One process for all of these, however large the one that it comes from has been."""
    numpy.ones(MAX_BYTES // 8 + 1)
    (tmp_path / "gate").touch()
    asked = preparer()
    potential = asked.prepare("slow", SLOW, args(tmp_path))
    assert isinstance(potential, TableTwist) and potential.how == "well"
    for name, code, arguments, kind, message in (
        ("slow", SLOW, args(tmp_path, "raise"), "refused", "potential 'slow': prepare raised ValueError: no automaton"),
        ("slow", SLOW, args(tmp_path, "exit"), "potential", "potential 'slow': prepare raised SystemExit: 3"),
        ("slow", SLOW, args(tmp_path, "flow"), "potential", "potential 'slow': what prepare left of Slow cannot be pi"),
        ("no", "prepared:Nobody", "{}", "refused", "potential 'no': cannot load 'prepared:Nobody'"),
        ("plain", PLAIN, '{"x": 1}', "refused", "potential 'plain' with arguments .*unexpected keyword"),
    ):
        with pytest.raises(PrepareError, match=message) as caught:
            asked.prepare(name, code, arguments)
        assert caught.value.kind == kind
    plain = asked.prepare("plain", PLAIN, "{}")
    assert {int(pid) for _, pid in begun(tmp_path)} == {plain.prepared_in}


def test_a_helper_that_ends_is_replaced(preparer, tmp_path):
    (tmp_path / "gate").touch()
    asked = preparer()
    with pytest.raises(
        PrepareError, match="potential 'slow': the process that prepared it ended, with exit status 5"
    ) as caught:
        asked.prepare("slow", SLOW, args(tmp_path, "die"))
    assert caught.value.kind == "potential"
    first = asked.prepare("plain", PLAIN, "{}").prepared_in
    subprocess.run(["kill", "-9", str(first)], check=True)  # while it is idle, as the kernel might
    wait_until(lambda: not alive(first))
    assert asked.prepare("plain", PLAIN, "{}").prepared_in != first


def test_what_holds_the_interpreter_is_killed_with_what_it_started(preparer, tmp_path):
    (tmp_path / "gate").touch()
    asked = preparer(seconds=1.5)
    with pytest.raises(PrepareError) as caught:
        asked.prepare("slow", SLOW, args(tmp_path, "hold"))
    how = "was not done within setup_timeout_s=1.5, and was killed"
    assert str(caught.value) == f"potential 'slow': the process that prepared it {how}" and caught.value.kind == "limit"
    assert not alive(begun(tmp_path)[0][1])
    wait_until(lambda: not alive((tmp_path / "child").read_text()))
    assert asked.prepare("plain", PLAIN, "{}").prepared_in


def test_close_ends_what_runs(preparer, tmp_path):
    """A helper at work, one that is idle, and what would begin later."""
    asked, errors = preparer(), []
    asked.warm_up()
    idle = asked.prepare("plain", PLAIN, "{}").prepared_in

    def ask():
        with pytest.raises(PrepareError) as caught:
            asked.prepare("slow", SLOW, args(tmp_path))
        errors.append(str(caught.value))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: begun(tmp_path))
    asked.warm_up()
    warm = asked._idle._process.pid
    asked.close()
    thread.join(200)
    assert errors and not alive(idle) and not alive(warm)
    with pytest.raises(PrepareError, match="shut down"):
        asked.prepare("plain", PLAIN, "{}")


def test_no_helper_outlives_a_process_that_is_killed(tmp_path):
    """Whatever the helper does: here it holds its interpreter's lock, and so no thread of it could see the end."""
    (tmp_path / "gate").touch()
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from fastsmc.vllm.prepare import Preparer\n"
        f"Preparer(None, 600).prepare('slow', {SLOW!r}, {args(tmp_path, 'hold')!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    finally:
        process.kill()
        process.wait()
    helper, child = begun(tmp_path)[0][1], (tmp_path / "child").read_text()
    wait_until(lambda: not alive(helper) and not alive(child))
