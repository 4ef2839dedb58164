"""fastsmc's metrics, read from what a Prometheus server reads: vLLM's own /metrics."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from vllm import SamplingParams
from vllm.entrypoints.serve.instrumentator import metrics as vllm_metrics
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from fastsmc.vllm.serve import outputs
from fastsmc.vllm.serve.errors import STATUS, GroupError
from fastsmc.vllm.serve.metrics import OUTCOMES, Metrics, front_end_metrics
from fastsmc.vllm.serve.outputs import Record, with_groups


@pytest.fixture(scope="module")
def scrape():
    """Reads /metrics as vLLM mounts it: values by name and labels, those of the model alone."""
    app = FastAPI()
    vllm_metrics.attach_router(app)
    client = TestClient(app)

    def read(model):
        answer = client.get("/metrics")
        assert answer.status_code == 200
        samples = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                labels = dict(sample.labels)
                if family.name.startswith("fastsmc:") and labels.pop("model_name") == model:
                    labels.pop("engine")
                    samples[sample.name.removeprefix("fastsmc:"), *labels.values()] = sample.value
        return samples

    return read


def test_a_group_from_arrival_to_end(scrape):
    metrics = Metrics("life", "3")
    metrics.started("a", 16)
    metrics.started("b", 4)
    waiting = scrape("life")
    assert (waiting["groups_waiting",], waiting["groups_running",], waiting["particles_running",]) == (2, 0, 0)

    metrics.progress("a", [])  # as the first output, which may have no step yet
    metrics.progress(
        "a",
        [
            {"step": 0, "ess": 16.0, "log_z": 0.0, "resampled": False, "finished": 0, "distinct": 12},
            {"step": 1, "ess": 4.0, "log_z": -1.0, "resampled": True, "finished": 0, "distinct": 4},
            {"step": 2, "ess": 0.0, "log_z": None, "resampled": False, "finished": 16, "distinct": 0},
        ],
    )
    running = scrape("life")
    assert (running["groups_waiting",], running["groups_running",], running["particles_running",]) == (1, 1, 16)
    assert running["resamplings_total",] == 1
    assert (running["ess_fraction_sum",], running["ess_fraction_count",]) == (1.25, 2)
    assert (running["ess_fraction_bucket", "0.2"], running["ess_fraction_bucket", "0.3"]) == (0, 1)
    assert (running["distinct_share_sum",], running["distinct_share_count",]) == (1.0, 2)

    metrics.ended("a", "finished", 160, 3.0)
    metrics.ended("b", "aborted", 0, 0.05)
    metrics.ended("never started", "refused")
    metrics.progress("a", [{"step": 3, "ess": 1.0, "resampled": True}])  # late: it no longer counts
    metrics.progress("of another kind", [{"step": 3, "ess": 1.0, "resampled": True}])
    ended = scrape("life")
    assert {ended[name,] for name in ("groups_waiting", "groups_running", "particles_running")} == {0}
    assert ended["particle_tokens_total",] == 160 and ended["resamplings_total",] == 1
    assert (ended["group_seconds_count",], ended["group_seconds_sum",]) == (2, 3.05)
    assert {o: ended["groups_total", o] for o in OUTCOMES} == {
        **dict.fromkeys(OUTCOMES, 0), "finished": 1, "aborted": 1, "refused": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"outcome='lost': must be one of 'finished'"):
        metrics.ended("a", "lost")


def test_it_begins_at_zero_with_vllms_labels_and_is_made_twice(scrape):
    Metrics("new")
    metrics = Metrics("new")  # of a second server in this process
    samples = {key: value for key, value in scrape("new").items() if not key[0].endswith("_created")}
    assert set(samples.values()) == {0}
    assert {name for name, *_ in samples if not name.endswith(("_bucket", "_sum", "_count"))} == {
        "groups_running", "groups_waiting", "particles_running", "particle_tokens_total", "resamplings_total",
        "groups_total",
    }  # fmt: skip
    metrics.started("a", 5)
    metrics.started("a", 7)  # a request that comes again, as vLLM restarts one, is not two
    metrics.progress("a", [])
    assert scrape("new")["particles_running",] == 7


@pytest.mark.parametrize(
    "parallel, engine",
    [
        ({}, "0"),
        ({"data_parallel_size": 4, "data_parallel_size_local": 4}, ""),
        ({"data_parallel_size": 4, "data_parallel_external_lb": True, "data_parallel_rank": 2}, "2"),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}, ""),
    ],
)
def test_the_engine_is_named_where_there_is_one(parallel, engine):
    name = f"parallel {parallel}"
    plain = {"data_parallel_size": 1, "data_parallel_size_local": 1, "data_parallel_rank": 0}
    plain |= {"data_parallel_external_lb": False, "data_parallel_hybrid_lb": False}
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name=name), parallel_config=SimpleNamespace(**plain | parallel)
    )
    metrics = front_end_metrics(config)
    assert front_end_metrics(config) is metrics
    metrics.ended("a", "finished", 5)
    labels = {"model_name": name, "engine": engine}
    assert REGISTRY.get_sample_value("fastsmc:particle_tokens_total", labels) == 5


def test_each_kind_of_error_is_an_outcome(scrape, monkeypatch):
    """Of what vLLM raises, too; only a client that leaves aborts. A group without reports of its steps runs as well."""
    assert set(STATUS) | {"finished", "aborted"} == set(OUTCOMES)

    async def end(model, error):
        async def stock(client, prompt, params, request_id):
            payload = {"smc": {"step": 1}}  # as of a captured group
            yield SimpleNamespace(kv_transfer_params=payload, finished=False)
            if error == "abort":  # the operator's; with the steps that nobody has taken away yet
                step = {"step": 1, "ess": 2.0, "log_z": 0.0, "resampled": True, "finished": 0, "distinct": 4}
                left = [SimpleNamespace(finish_reason="abort")]
                yield SimpleNamespace(kv_transfer_params={"smc": {"progress": [step]}}, finished=True, outputs=left)
            elif error is not None:
                raise error

        plain = {"data_parallel_size": 1, "data_parallel_external_lb": False, "data_parallel_hybrid_lb": False}
        config = SimpleNamespace(
            model_config=SimpleNamespace(served_model_name=model), parallel_config=SimpleNamespace(**plain),
            additional_config={"fastsmc": {"captured_steps": True}},
        )  # fmt: skip
        client = SimpleNamespace(
            vllm_config=config, input_processor=SimpleNamespace(generation_config_fields={}),
            renderer=SimpleNamespace(tokenizer=None, get_eos_token_id=lambda: 1),
        )  # fmt: skip
        params = SamplingParams(extra_args={"smc_n_particles": 4}, output_kind=RequestOutputKind.DELTA)
        monkeypatch.setattr(outputs, "Choices", lambda *args: SimpleNamespace(extend=lambda output: None))
        record = Record()
        stream = with_groups(stock)(client, "a", params, "id", smc_record=record)
        await anext(stream)
        assert scrape(model)["particles_running",] == 4
        if error is None:
            await stream.aclose()
        elif error == "abort":
            await anext(stream)
            assert record.payload == {}  # there is no population
            await stream.aclose()
        else:
            with pytest.raises(type(error) if isinstance(error, EngineDeadError) else GroupError):
                await anext(stream)
        return record.error

    for error, outcome, status in (
        (None, "aborted", None),
        ("abort", "aborted", None),
        (EngineDeadError(), "engine", None),
        (VLLMValidationError("no", parameter="logit_bias"), "refused", 400),
        (QueueOverflowError(), "busy", 503),
    ):
        known = asyncio.run(end(f"ends {error}", error))
        samples = scrape(f"ends {error}")
        assert {name: samples["groups_total", name] for name in OUTCOMES} == dict.fromkeys(OUTCOMES, 0) | {outcome: 1}
        assert samples["groups_running",] == 0 and (known and known.http_status) == status
        assert status != 400 or known.param == "logit_bias"


def test_threads_and_tasks_lose_nothing(scrape):
    metrics = Metrics("many")
    step = {"step": 0, "ess": 2.0, "log_z": 0.0, "resampled": True, "finished": 0, "distinct": 4}

    def life(name):
        metrics.started(name, 4)
        for _ in range(3):
            metrics.progress(name, [step, step])
        metrics.ended(name, "finished", 6, 0.1)

    async def tasks(prefix):
        await asyncio.gather(*(asyncio.to_thread(life, f"{prefix}.{i}") for i in range(50)))

    threads = [threading.Thread(target=asyncio.run, args=(tasks(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    samples = scrape("many")
    assert samples["groups_total", "finished"] == samples["group_seconds_count",] == 200
    assert samples["resamplings_total",] == samples["ess_fraction_count",] == samples["particle_tokens_total",] == 1200
    assert {samples[name,] for name in ("groups_waiting", "groups_running", "particles_running")} == {0}


def test_api_servers_of_one_port_are_summed(tmp_path):
    """Of several API servers, each a process, vLLM's registry sums the files: whoever answers says the same."""
    server = """
import json, sys
from fastsmc.vllm.serve.metrics import Metrics
metrics = Metrics("shared", "")
metrics.started("a", int(sys.argv[1]))
metrics.progress("a", [{"step": 0, "ess": 1.0, "resampled": True, "distinct": 1}])
metrics.started("b", 9)
metrics.ended("c", "finished", 10, 1.0)
print("ready", flush=True)
sys.stdin.readline()
from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry
print(json.dumps(generate_latest(get_prometheus_registry()).decode()), flush=True)
sys.stdin.readline()
"""
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", server, str(n)], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for n in (3, 5)
    ]
    try:
        assert [s.stdout.readline() for s in servers] == ["ready\n"] * 2
        answers = []
        for s in servers:
            print(file=s.stdin, flush=True)
            answers.append(json.loads(s.stdout.readline()))
    finally:
        for s in servers:
            s.communicate()
    for text in answers:
        samples = {
            (s.name.removeprefix("fastsmc:"), s.labels.get("outcome", s.labels.get("le", ""))): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if s.labels.get("model_name") == "shared"
        }
        assert samples["groups_running", ""] == samples["groups_waiting", ""] == 2
        assert samples["particles_running", ""] == 8
        assert samples["groups_total", "finished"] == samples["resamplings_total", ""] == 2
        assert samples["particle_tokens_total", ""] == 20
        assert samples["ess_fraction_bucket", "0.2"] == 1 and samples["ess_fraction_bucket", "0.4"] == 2


@pytest.mark.engine
def test_a_server_counts_its_groups(server):
    names = ("groups_total", "particle_tokens_total", "group_seconds_count", "ess_fraction_count", "resamplings_total")

    def counts():
        outcomes = {name: server.metric("fastsmc:groups_total", f'outcome="{name}"') for name in OUTCOMES}
        return outcomes | {name: server.metric(f"fastsmc:{name}") for name in names}

    before, task = counts(), {"prompt": "theprompt", "n_particles": 8, "max_tokens": 6}
    answer = server.smc(**task, ignore_eos=True, ess_threshold=1.0)
    after = counts()
    gained = {name: after[name] - before[name] for name in after}
    assert gained["particle_tokens_total"] == answer["usage"]["particle_tokens"] == 48
    assert gained["group_seconds_count"] == 1 and gained["ess_fraction_count"] == answer["steps"]
    impossible = server.post("/v1/smc", **task, potential="never").json()["smc"]
    for status, wrong in (
        *((400, {"potential": "nothing"}), (400, {"logit_bias": {"99999999": 1}})),  # the second is vLLM's refusal
        *((413, {"n_particles": 129}), (500, {"potential": "fails"}), (500, {"potential": "failsatend"})),
    ):
        assert server.post("/v1/smc", **{**task, **wrong}).status_code == status
    gained = {name: count - before[name] for name, count in counts().items()}
    assert gained["particle_tokens_total"] == 48 + impossible["particle_tokens"] > 48
    ends = {"finished": 1, "impossible": 1, "refused": 2, "limit": 1, "potential": 2}
    assert {name: gained[name] for name in OUTCOMES} == dict.fromkeys(OUTCOMES, 0) | ends
    assert gained["groups_total"] == 7 and gained["group_seconds_count"] == 4
    assert server.metric("fastsmc:groups_running") == 0
