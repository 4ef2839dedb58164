"""The reason of a failure is dug out of an engine's log, and errors of other packages become one line."""

import subprocess
import sys

import pydantic
import pytest

from fastsmc import screen

WORKER = """\
(EngineCore pid=9) INFO 11-26 00:44:00 [core.py:157] Initializing a V1 LLM engine (v0.32.0)
(Worker pid=10) ERROR 11-26 00:44:01 [multiproc_executor.py:900] WorkerProc failed to start.
(Worker pid=10) ERROR 11-26 00:44:01 [multiproc_executor.py:900] Traceback (most recent call last):
(Worker pid=10) ERROR 11-26 00:44:01 [multiproc_executor.py:900]   File "cpu_worker.py", line 216, in f
(Worker pid=10) ERROR 11-26 00:44:01 [multiproc_executor.py:900]     raise ValueError(
(Worker pid=10) ERROR 11-26 00:44:01 [multiproc_executor.py:900] ValueError: Available memory on node 0 is too little
(EngineCore pid=9) ERROR 11-26 00:44:02 [core.py:1200] EngineCore failed to start.
(EngineCore pid=9) ERROR 11-26 00:44:02 [core.py:1200] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-26 00:44:02 [core.py:1200]   File "multiproc_executor.py", line 700, in g
(EngineCore pid=9) ERROR 11-26 00:44:02 [core.py:1200] Exception: WorkerProc initialization failed due to an \
exception in a background process. See stack trace for root cause.
Traceback (most recent call last):
  File "utils.py", line 1431, in wait_for_engine_startup
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
CHAIN = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 'LlamaForNothing'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in <module>
pkg.errors.ModelError: architecture LlamaForNothing is not known
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (WORKER, "Available memory on node 0 is too little"),
        (CHAIN, "pkg.errors.ModelError: architecture LlamaForNothing is not known"),
        ("ValueError: quoted in a log line, no traceback\n", None),
        (WORKER.split("ERROR")[0], None),
        ("", None),
    ],
)
def test_the_reason_is_found(log, cause):
    assert screen.find_cause(log) == cause


def test_cause_of_an_error_that_only_reports(tmp_path):
    path = tmp_path / "x.log"
    path.write_text(WORKER)
    log = screen.EngineLog(path, sys.stdout, sys.stderr)
    reports = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert str(log.error("no start", reports)) == f"no start: Available memory on node 0 is too little (log: {path})"
    assert log.cause(ValueError("a reason of its own")) == "a reason of its own"
    path.write_text("killed\n")
    assert log.cause(reports) == str(reports)  # nobody said why


def test_errors_become_one_line():
    class Config(pydantic.BaseModel):
        rows: int | bool
        name: str

    with pytest.raises(pydantic.ValidationError) as error:
        Config(rows="many", name=3)
    text = screen.one_line(error.value)
    assert "rows='many': Input should be a valid integer" in text and "name=3: Input should be" in text
    assert "\n" not in text and text.count("rows") == 1 and "pydantic" not in text
    assert screen.one_line(KeyError("x")) == "KeyError: 'x'" and screen.one_line(AssertionError()) == "AssertionError"
    assert screen.one_line(ValueError("a\n  b")) == "a b"


def test_what_processes_write_goes_to_the_log(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speak = [sys.executable, "-c", "import sys; print('child out'); print('child err', file=sys.stderr)"]
    with screen.engine_log("test") as log:
        log.say("ours")
        subprocess.run(speak, check=True)
        path = log.path
    print("after")
    out, err = capfd.readouterr()
    assert out == "ours\nafter\n" and not err
    assert "child out" in path.read_text() and "child err" in path.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody can write")
def test_logs_are_few_and_go_elsewhere_where_they_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for i in range(screen.KEPT_LOGS + 5):
        last = screen.new_log(f"n{i}")
    assert len(list(last.parent.iterdir())) == screen.KEPT_LOGS and last.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fastsmc.models.cache_dir", lambda: tmp_path / "file")  # a file in its place
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert screen.new_log("n").parent == tmp_path
