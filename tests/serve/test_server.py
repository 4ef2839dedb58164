"""A server process over real HTTP: populations, vLLM's own routes with groups, refusals, and clients that leave."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import subprocess
import sys
import threading
import time

import pytest

from .conftest import CALM, KEY, LETTERS, MAX_GROUPS, MODEL_ARGS, httpx
from .process import running

pytestmark = pytest.mark.engine
PROMPT = "theprompt"
LEXICON = {"potential": "lexicon", "potential_args": {"token_ids": [5, 6, 7], "weight": 1.5}}
TASK = {"prompt": PROMPT, "n_particles": 24, "max_tokens": 12, "seed": 7, "ess_threshold": 0.9}


def xargs(task=TASK, **more):
    """The task as the body of vLLM's completions; more: fields of SMCParams and of the request."""
    task = {**task, **more}
    shared = {
        name: task.pop(name) for name in ("prompt", "messages", "max_tokens", "seed", "n", "stream") if name in task
    }
    keys = {f"smc_{name}": json.dumps(value) if isinstance(value, dict) else value for name, value in task.items()}
    return {"model": "tiny", "vllm_xargs": keys, **shared}


def events(response):
    """The data of server-sent events, without the end's mark."""
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(chunk) for chunk in chunks[:-1]]


@pytest.fixture(scope="module")
def llm(letters_model, calm):
    """The same engine as the server's, in this process."""
    from fastsmc import LLM

    llm = LLM(str(letters_model), disable_log_stats=True, interventions={"calm": str(calm)}, **MODEL_ARGS)
    yield llm
    llm.shutdown()


def test_schema_and_key(server):
    schema = server.client.get("/openapi.json").json()
    fields = schema["components"]["schemas"]["SMCRequest"]["properties"]
    assert "number of particles" in fields["n_particles"]["description"] and fields["n_particles"]["default"] == 64
    assert {"messages", "potential_args", "twist", "n_samples", "return_genealogy", "stream"} <= fields.keys()
    assert {"intervention", "counterfactual", "factual_temperature", "noise"} <= fields.keys()
    posts = [path for path, methods in schema["paths"].items() if path.startswith("/v1") and "post" in methods]
    assert "/v1/smc" in posts and "/v1/completions" in posts
    for path in posts:
        assert httpx.post(server.url + path.replace("{", "").replace("}", ""), json={}).status_code == 401, path


def test_one_population_everywhere(server, llm):
    """For one seed /v1/smc, /v1/completions and `LLM.smc` have the same log Ẑ, and the same texts."""
    from fastsmc import SMCParams
    from fastsmc.potentials import Lexicon
    from fastsmc.vllm.serve.schemas import SMCPopulation

    answer = server.smc(**TASK, **LEXICON, n_samples=5, return_genealogy=True)
    SMCPopulation.model_validate(answer)
    completion = server.post(
        "/v1/completions", **xargs(**LEXICON, n=5, ignore_generation_config=1), stop_token_ids=[]
    ).json()
    fields = {name: value for name, value in TASK.items() if name != "prompt"}
    population = llm.smc(PROMPT, SMCParams(**fields), Lexicon(**LEXICON["potential_args"]))
    [output] = llm.generate([PROMPT], llm.lead_params(SMCParams(**fields)))
    particles = answer["particles"]
    assert [p["text"] for p in particles] == population.texts
    assert [p["token_ids"] for p in particles] == population.token_ids
    assert [p["finish_reason"] for p in particles] == population.finish_reasons
    for name, values in (("log_weight", population.log_weights), ("weight", population.weights)):
        assert [p[name] for p in particles] == pytest.approx(values.tolist(), abs=1e-5)
    assert [p["log_prob"] for p in particles] == pytest.approx(population.log_probs.tolist(), abs=1e-3)
    assert answer["log_z"] == pytest.approx(population.log_z, abs=1e-5) and answer["ess"] == pytest.approx(
        population.final_ess, rel=1e-5
    )
    assert answer["log_z_stderr"] == pytest.approx(population.log_z_stderr, rel=1e-4) and 0 < answer["log_z_stderr"] < 1
    assert (answer["log_z_stderr_reason"], answer["distinct_roots"]) == (None, population.n_roots)
    genealogy = answer["genealogy"]
    assert genealogy["ancestors"] == population.ancestors.tolist()
    assert genealogy["tokens"] == population.tokens.tolist()
    assert genealogy["token_texts"] == {str(t): LETTERS[t] for t in {*population.tokens.flat} - {-1}}
    n_tokens = sum(map(len, population.token_ids))
    n_drawn = int((population.tokens >= 0).sum())  # with those that resampling left behind
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": n_tokens,
        "total_tokens": len(PROMPT) + n_tokens,
        "particle_tokens": n_drawn,
    }

    assert len(answer["samples"]) == 5
    [summary] = completion["smc"]
    assert summary["log_z"] == pytest.approx(answer["log_z"], abs=1e-5) and summary["p0"] == answer["p0"]
    assert summary["log_z_stderr"] == pytest.approx(answer["log_z_stderr"], rel=1e-4)
    drawn = [particles[i] for i in answer["samples"]]
    assert [c["finish_reason"] for c in completion["choices"]] == [p["finish_reason"] for p in drawn]
    assert [c["text"] for c in completion["choices"]] == [p["text"] for p in drawn]
    assert completion["usage"]["completion_tokens"] == sum(len(p["token_ids"]) for p in drawn)
    assert completion["usage"]["particle_tokens"] == n_drawn
    plain = server.post("/v1/completions", **xargs(ignore_generation_config=1)).json()
    assert plain["choices"][0]["text"] == output.outputs[0].text


SETTINGS = [
    {"top_k": 3},
    {"top_p": 0.5, "temperature": 1.3},
    {"min_p": 0.3},
    {"logit_bias": {"5": 2.0, "1": -3.0}},
    {"min_tokens": 6, "stop_token_ids": [6, 7, 24]},
    {"allowed_token_ids": [1, 5, 6, 7], "stop": ["dfe", "fd"]},
    {"allowed_token_ids": [5, 6, 7], "stop": "ef", "min_tokens": 4},
    {"force_stop": True},
    {"force_stop": True, "ignore_eos": True, "stop_token_ids": [6, 7], "top_k": 20, "min_p": 0.01, "min_tokens": 2},
    {"twist": "small"},
    {"power": 2.0, "power_ramp": 3, "resample_every": 2, "resampling_temperature": 1.5},
    {"segment": ["e", "fd"], "segment_token_ids": [6], "max_segment_tokens": 3, "proposal": "base"},
    {"islands": 4, "migrate_every": 2, "allowed_token_ids": [5, 6, 7, 8, 9], "stop": "ef", "proposal": "base"},
]
#: what `SamplingParams` has no word for
OWN = (
    *("twist", "force_stop", "power", "power_ramp", "resample_every", "resampling_temperature", "proposal"),
    *("segment", "segment_token_ids", "max_segment_tokens", "islands", "migrate_every"),
)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_settings_everywhere(server, llm, twist_path, settings):
    """Settings of p0 and of ends, and a twist: all routes and both calls have one population, and say its p0."""
    from fastsmc import SMCParams
    from fastsmc.potentials import Lexicon

    fields = {name: value for name, value in (TASK | settings).items() if name not in ("prompt", "twist")}
    params, twist = SMCParams(**fields), str(twist_path) if "twist" in settings else None
    lead = llm.lead_params(params, "lexicon", twist=twist)
    lead.extra_args["smc_potential_args"] = json.dumps(LEXICON["potential_args"])
    [output] = llm.generate([PROMPT], lead)
    population = llm.smc(PROMPT, params, Lexicon(**LEXICON["potential_args"]), twist=twist)

    answer = server.smc(**TASK, **LEXICON, **settings, n_samples=4)
    assert answer["log_z"] == pytest.approx(population.log_z, abs=1e-5) and answer["p0"] == params.p0()
    particles = answer["particles"]
    assert [p["token_ids"] for p in particles] == population.token_ids
    assert [p["text"] for p in particles] == population.texts
    assert [p["finish_reason"] for p in particles] == population.finish_reasons
    if population.segments is not None:
        assert answer["boundaries"] == population.boundaries.tolist() and len(population.boundaries) > 2
        assert [p["segments"] for p in particles] == population.segments.tolist()
    drawn = [particles[i] for i in answer["samples"]]
    assert output.outputs[0].text == drawn[0]["text"]

    keys = {name: settings[name] for name in OWN if name in settings}
    shared = {name: value for name, value in settings.items() if name not in keys}
    body = {**xargs(**LEXICON, **keys, ignore_generation_config=True), **shared}
    completion = server.post("/v1/completions", **body, n=4).json()
    [summary] = completion["smc"]
    assert summary["log_z"] == pytest.approx(answer["log_z"], abs=1e-5) and summary["p0"] == answer["p0"]
    ends = [(p["text"], p["finish_reason"]) for p in drawn]
    assert [(c["text"], c["finish_reason"]) for c in completion["choices"]] == ends
    streamed = [["", None] for _ in ends]
    for choice in (
        c for chunk in events(server.post("/v1/completions", **body, n=4, stream=True)) for c in chunk["choices"]
    ):
        streamed[choice["index"]][0] += choice["text"]
        streamed[choice["index"]][1] = choice["finish_reason"] or streamed[choice["index"]][1]
    assert [tuple(choice) for choice in streamed] == ends
    body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    [choice] = server.post("/v1/chat/completions", **body).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ends[0]

    if "stop" in settings:
        for particle in particles:  # the text leaves out the stop string that the tokens have
            whole = "".join(LETTERS[t] for t in particle["token_ids"]).removesuffix("</s>")
            first = min(
                (at for s in params.stop if (at := whole.find(s, max(0, params.min_tokens - 1))) >= 0), default=None
            )
            assert particle["text"] == whole[:first]
        assert any(p["token_ids"][-1] != 1 and p["finish_reason"] == "stop" for p in particles)
    if params.islands > 1:
        assert (population.island[population.ancestors] != population.island).any()  # they have migrated
    if params.force_stop:
        assert {p["finish_reason"] for p in particles} == {"stop"}


def test_interventions_everywhere(server, llm):
    """One that the operator has named is what the program gives, and what it names; plain groups know nothing of it."""
    from fastsmc import SMCParams
    from fastsmc.potentials import Lexicon

    params = SMCParams(**{name: value for name, value in TASK.items() if name != "prompt"})
    potential = Lexicon(**LEXICON["potential_args"])
    want, plain = llm.smc(PROMPT, params, potential, intervention=CALM), llm.smc(PROMPT, params, potential)
    answer, other = server.smc(**TASK, **LEXICON, intervention="calm"), server.smc(**TASK, **LEXICON)
    assert [p["token_ids"] for p in answer["particles"]] == want.token_ids
    assert answer["log_z"] == pytest.approx(want.log_z, abs=1e-4) and abs(want.log_z - plain.log_z) > 0.01
    assert [p["token_ids"] for p in other["particles"]] == plain.token_ids
    lead = llm.lead_params(params, "lexicon", intervention="calm")
    lead.extra_args["smc_potential_args"] = json.dumps(LEXICON["potential_args"])
    [output] = llm.generate([PROMPT], lead, use_tqdm=False)
    [summary] = server.post(
        "/v1/completions", **xargs(**LEXICON, intervention="calm", ignore_generation_config=1)
    ).json()["smc"]
    for log_z in (output.kv_transfer_params["smc"]["log_z"], summary["log_z"]):
        assert log_z == pytest.approx(want.log_z, abs=1e-4)


@pytest.mark.parametrize(
    "settings", [{"intervention": "calm"}, {"intervention": "calm", "noise": "gumbel", "top_k": 20, "temperature": 1.5},
                 {"factual_temperature": 1.0, "temperature": 0.6}]
)  # fmt: skip
def test_counterfactuals_everywhere(server, llm, settings):
    """What `LLM.counterfactual` gives, from every route; and the whole of it in `smc_return_population`."""
    from fastsmc import SMCParams
    from fastsmc.counterfactuals import Counterfactuals
    from fastsmc.interventions import Temperature
    from fastsmc.vllm.serve.schemas import SMCPopulation

    drawn = {"temperature": settings.get("factual_temperature", settings.get("temperature", 1.0))}
    drawn |= {name: settings[name] for name in ("top_k",) if name in settings}
    [particle] = server.smc(prompt=PROMPT, n_particles=1, max_tokens=8, ignore_eos=True, seed=5, **drawn)["particles"]
    text = particle["token_ids"]
    params = SMCParams(n_particles=24, max_tokens=10, seed=7, ignore_eos=True, **drawn)
    change = [*(CALM if "intervention" in settings else ()), Temperature(settings.get("temperature", 1.0))]
    want = llm.counterfactual(PROMPT, text, change, params=params, noise=settings.get("noise", "exact"))
    assert 0 < want.expected_common_prefix < 8

    task = {**TASK, "max_tokens": 10, "ignore_eos": True, "counterfactual": text, **settings}
    answer = server.smc(**task, n_samples=3)
    SMCPopulation.model_validate(answer)
    particles, about = answer["particles"], answer["counterfactual"]
    assert [p["token_ids"] for p in particles] == want.token_ids
    assert [p["common_prefix"] for p in particles] == want.common_prefix.tolist()
    assert [p["log_kernel"] for p in particles] == pytest.approx(want.log_kernel.tolist(), abs=1e-3)
    assert (about["token_ids"], about["text"]) == (text, "".join(LETTERS[t] for t in text if t > 1))
    assert about["log_probs"] == pytest.approx(want.factual_log_probs.tolist(), abs=1e-4)
    assert about["stay"] == pytest.approx(want.stay.tolist(), abs=1e-4)
    assert about["survival"] == pytest.approx(want.survival.tolist(), abs=1e-4)
    assert about["expected_common_prefix"] == pytest.approx(want.expected_common_prefix, abs=1e-4)

    shared = {name: task.pop(name) for name in ("ignore_eos", "top_k", "temperature") if name in task}
    body = {**xargs(task, n=3, ignore_generation_config=1, return_population=1), **shared}
    chat = {**body, "messages": [{"role": "user", "content": PROMPT}]}
    chat.pop("prompt")
    for path, asked in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        [summary] = server.post(path, **asked).json()["smc"]
        population = Counterfactuals.from_bytes(base64.b64decode(summary["population"]))
        assert population.token_ids == want.token_ids and population.factual_ids == text
        assert population.stay == pytest.approx(want.stay, abs=1e-4)
        about = summary["counterfactual"]
        assert about["token_ids"] == text and about["stay"] == population.stay.tolist()
        assert about["sample_common_prefixes"] == [particles[i]["common_prefix"] for i in answer["samples"]]
    *_, last = events(server.post("/v1/completions", **body, stream=True))
    assert last["smc"][0]["counterfactual"]["stay"] == population.stay.tolist()
    with server.client.stream("POST", "/v1/smc", json={**task, **shared, "stream": True}) as response:
        *_, last = (json.loads(line) for line in response.iter_lines())
    assert last["counterfactual"] == answer["counterfactual"] and last["particles"] == particles


def test_stream_of_steps(server):
    with server.client.stream("POST", "/v1/smc", json={**TASK, **LEXICON, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in response.iter_lines()]
    *steps, population = lines
    assert [line["event"] for line in lines] == ["step"] * len(steps) + ["population"]
    assert [step["step"] for step in steps] == list(range(1, population["steps"] + 1))
    assert all({"ess", "log_z", "resampled", "finished", "distinct"} <= step.keys() for step in steps)
    alone = server.smc(**TASK, **LEXICON)
    for key in ("particles", "log_z", "samples"):
        assert population[key] == alone[key]
    assert (
        server.smc(**{**TASK, "prompt": None}, messages=[{"role": "user", "content": PROMPT}], **LEXICON)["particles"]
        == alone["particles"]
    )


def test_streamed_completions_are_the_others(server):
    """A stream's choices are those of the answer without one; its last chunk has the summaries, one per prompt."""
    # a small seed of tokens: all lineages share much
    task = {**TASK, "n_particles": 6, "max_tokens": 20, "ess_threshold": 1.0, **LEXICON}
    body = {**xargs(task, n=2), "prompt": ["abc", "x"]}
    whole = server.post("/v1/completions", **body).json()
    assert [s["n_particles"] for s in whole["smc"]] == [6, 6] and whole["smc"][0]["log_z"] != whole["smc"][1]["log_z"]
    usage = {"stream_options": {"include_usage": True}}
    for path, more in (("/v1/completions", usage), ("/v1/completions", {})):
        chunks = events(server.post(path, **body, stream=True, **more))
        texts = [""] * 4
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in whole["choices"]]
        assert chunks[-1]["smc"] == whole["smc"] and not any("smc" in chunk for chunk in chunks[:-1])
        if more:
            assert chunks[-1]["usage"]["particle_tokens"] == whole["usage"]["particle_tokens"]
            assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]

    chat = xargs({**task, "prompt": None}, messages=[{"role": "user", "content": "abc"}])
    [choice] = server.post("/v1/chat/completions", **chat).json()["choices"]
    assert choice["message"]["content"] == whole["choices"][0]["text"]
    chunks = events(server.post("/v1/chat/completions", **chat, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == choice["message"]["content"]
    assert chunks[-1]["smc"] == whole["smc"][:1]


#: `vllm bench serve`, also where the `vllm` script cannot start
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_vllm_bench_serve(server, letters_model, environment, tmp_path):
    """vLLM's own client of load runs against groups."""
    body = {"vllm_xargs": {"smc_n_particles": 4, "smc_ignore_generation_config": "true"}, "temperature": 1.0}
    flags = {
        "backend": "openai", "base-url": server.url, "model": "tiny", "tokenizer": str(letters_model),
        "dataset-name": "random", "random-input-len": 8, "random-output-len": 6, "num-prompts": 5,
        "extra-body": json.dumps(body), "result-dir": str(tmp_path), "result-filename": "bench.json",
        "header": f"Authorization=Bearer {KEY}",
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in flags.items()] + ["--save-result", "--ignore-eos"]
    before = server.metric("fastsmc:groups_total", 'outcome="finished"')
    done = subprocess.run([sys.executable, "-c", BENCH, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["completed"] == 5 and result["total_output_tokens"] == 30
    assert server.metric("fastsmc:groups_total", 'outcome="finished"') - before >= 5


def test_openai_client(server):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    task = xargs(**LEXICON, n=3)
    extra = {"vllm_xargs": task.pop("vllm_xargs")}
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY)
    answer = client.completions.create(**task, extra_body=extra)
    assert len({choice.text for choice in answer.choices}) > 1 and answer.smc[0]["n_particles"] == 24
    with pytest.raises(openai.BadRequestError, match="n_particles=0"):
        client.completions.create(**task, extra_body={"vllm_xargs": {"smc_n_particles": 0}})

    async def draw():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
            stream = await client.completions.create(**task, stream=True, extra_body=extra)
            return [chunk async for chunk in stream]

    chunks = asyncio.run(draw())
    texts = {i: "".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in range(3)}
    assert list(texts.values()) == [choice.text for choice in answer.choices] and chunks[-1].smc == answer.smc


def test_replicas(server, letters_model, environment, tmp_path):
    """Two engines of a dense model behind one front end, vLLM's own server with the switch: either gives what the
    server with one gives."""
    want = server.smc(**TASK)
    with running(letters_model, environment, tmp_path / "log", [], ["--data-parallel-size=2"], stock=True) as pair:
        for rank in ("0", "1"):
            answer = pair.client.post("/v1/smc", json=TASK, headers={"X-data-parallel-rank": rank}).json()
            assert [answer[key] for key in ("log_z", "particles")] == [want[key] for key in ("log_z", "particles")]
            assert pair.metric("vllm:request_success_total", f'engine="{rank}"') == 1


def test_defaults_of_the_server(server):
    """The model's generation config is p0's where groups can have it, unless declined; /v1/smc never takes it."""
    assert server.smc(prompt="a", n_particles=2)["p0"].get("top_p", 1.0) == 1.0
    [taken] = server.post("/v1/completions", **xargs()).json()["smc"]
    [declined] = server.post("/v1/completions", **xargs(ignore_generation_config="true")).json()["smc"]
    [said] = server.post("/v1/completions", **xargs(), top_p=0.5).json()["smc"]
    assert (taken["p0"]["top_p"], declined["p0"].get("top_p", 1.0), said["p0"]["top_p"]) == (0.9, 1.0, 0.5)
    chat = xargs({"n_particles": 4}, messages=[{"role": "user", "content": "a"}], ignore_eos=None)
    chat["vllm_xargs"].pop("smc_ignore_eos")
    long = server.post("/v1/chat/completions", **chat, ignore_eos=True).json()
    assert long["usage"]["completion_tokens"] == MODEL_ARGS["max_model_len"] - 1  # below the cap of 256
    chat["messages"][0]["content"] = "a" * 250
    rest = server.post("/v1/chat/completions", **chat, ignore_eos=True).json()
    assert rest["usage"]["completion_tokens"] == MODEL_ARGS["max_model_len"] - 250
    unsaid = server.post("/v1/completions", **xargs({"n_particles": 128, "prompt": "a"}), ignore_eos=True).json()
    assert unsaid["usage"]["completion_tokens"] == 16  # as of any completion


SMC_REFUSALS = [
    ({"n_particles": 0}, 400, "n_particles"),
    ({"n_particles": "8"}, 400, "n_particles"),
    ({"n_particles": 129}, 413, "max_particles"),
    ({"n_particles": 128, "max_tokens": 65}, 413, "max_particle_tokens"),
    ({"max_tokens": 300}, 400, "max_tokens"),
    ({"temperature": 0}, 400, "temperature"),
    ({"seed": -5}, 400, "seed"),
    ({"resampling": "no"}, 400, "resampling"),
    ({"potential": "infill"}, 400, "potential"),  # not among this server's
    ({"potential": "lexicon", "potential_args": "x"}, 400, "body.potential_args"),
    ({"potential_args": {"token_ids": [5]}}, 400, "potential_args"),
    ({"twist": "/etc", "potential": "lexicon", "potential_args": {"token_ids": [5]}}, 400, "twist"),
    ({"n_samples": 100}, 400, "n_samples"),
    ({"stop_token_ids": [99]}, 400, "stop_token_ids"),
    ({"stop": "a", "exact": [[5]]}, 400, "exact"),
    ({"prompt": [99]}, 400, None),  # vLLM's own words
    ({"prompt": None}, 400, "prompt"),
    ({"presence_penalty": 1.0}, 400, "presence_penalty"),
    ({"intervention": "storm"}, 400, "intervention"),
    ({"segment": ""}, 400, "segment"),
    ({"segment": ["a", "</s>"]}, 400, "segment"),  # which no text holds
    ({"max_segment_tokens": 0}, 400, "max_segment_tokens"),
    ({"islands": 3}, 400, "islands"),
    ({"migrate_every": 2}, 400, "migrate_every"),
    ({"islands": 2, "migrate_every": 2, "exact": [[5] * 4]}, 400, "exact"),
    ({"islands": 2, "migrate_every": 2, "counterfactual": [5]}, 400, "islands"),
    ({"counterfactual": [5], "segment": "a"}, 400, "segment"),
    ({"counterfactual": []}, 400, "counterfactual"),
    ({"counterfactual": [5, 99]}, 400, "counterfactual"),
    ({"counterfactual": [5, 1, 6]}, 400, "counterfactual"),  # on after a stop token
    ({"counterfactual": [5] * 260}, 400, "counterfactual"),
    ({"counterfactual": [5], "allowed_token_ids": [6]}, 400, "counterfactual"),  # which p0 gives no probability
    ({"counterfactual": [5], "factual_temperature": 0}, 400, "factual_temperature"),
    ({"counterfactual": [5], "noise": "loud"}, 400, "noise"),
    ({"counterfactual": [5], "noise": "gumbel", **LEXICON}, 400, "noise"),
    ({"noise": "gumbel"}, 400, "noise"),
    ({"counterfactual": [5], "facts": "a"}, 400, "facts"),
    ({"model": "no"}, 404, "model"),
    ({"potential": "fails"}, 500, None),
    ({"potential": "never"}, 422, None),
    # nothing changes, which the potential rules out at once; the text has three more tokens
    ({"counterfactual": [5, 6, 7, 8], "potential": "regex", "potential_args": {"pattern": "Q"}}, 422, None),
]


@pytest.mark.parametrize(("wrong", "status", "param"), SMC_REFUSALS)
def test_smc_refuses(server, wrong, status, param):
    """Alike in a stream, where it is known before the stream begins; and the engine goes on."""
    for stream in (False, True):
        response = server.post("/v1/smc", **{**TASK, "n_particles": 8, "max_tokens": 4, **wrong, "stream": stream})
        if stream and response.status_code == 200:  # it had begun
            body = json.loads(response.text.splitlines()[-1])
            assert body.pop("event") == "error" and status in (422, 500)
        else:
            assert response.status_code == status, response.text
            body = response.json()
        error = body["error"]
        assert error["code"] == status and (param is None or error["param"] == param), error
        if status == 422:
            assert body["smc"]["log_z"] is None and body["smc"]["log_z_is_minus_inf"] is True
        elif status == 500:
            assert "broken at step 2" in error["message"]
        elif param is not None and "." not in param:
            assert param in error["message"]
        assert "smc_" not in error["message"]  # how the body's fields travel
    assert server.wait_idle()


POTENTIAL_REFUSALS = [
    ("lexicon", {"token_ids": [99]}, "potential_args", "token_ids hold 99"),
    ("lexicon", {"no": 1}, "potential_args", "'no'"),
    ("regex", {"pattern": "("}, "potential_args", "pattern='('"),
    ("regex", {"pattern": "[0-9]"}, "potential_args", "pattern='[0-9]'"),
    ("no", {}, "potential", "potential='no'"),
]


@pytest.mark.parametrize(("potential", "args", "param", "what"), POTENTIAL_REFUSALS)
def test_potentials_refuse(server, potential, args, param, what):
    """What is wrong with a potential is said alike by every route, streaming or not."""
    for stream in (False, True):
        own = {**TASK, "potential": potential, "potential_args": args, "stream": stream}
        keys = {"smc_n_particles": 8, "smc_potential": potential, "smc_potential_args": json.dumps(args)}
        shared = {"model": "tiny", "max_tokens": 4, "vllm_xargs": keys, "stream": stream}
        chat = {**shared, "messages": [{"role": "user", "content": PROMPT}]}
        answers = [
            (param, server.post("/v1/smc", **own)),
            ("smc_" + param, server.post("/v1/completions", **shared, prompt=PROMPT)),
            ("smc_" + param, server.post("/v1/chat/completions", **chat)),
        ]
        for name, response in answers:
            error = response.json()["error"]
            assert response.status_code == error["code"] == 400 and error["param"] == name
            assert name.startswith("smc_") or "smc_" not in error["message"]
            assert what in error["message"]


def test_what_is_no_text(server):
    """A lone surrogate, which JSON can hold and UTF-8 cannot, is the client's mistake."""
    keys = {"smc_potential": "lexicon", "smc_potential_args": '{"words": ["\ud800"]}'}
    for stop, more, param in (("\ud800", {}, "stop"), ("a", keys, "smc_potential_args")):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 4, "stop": stop}
        text = json.dumps(body | {"vllm_xargs": {"smc_n_particles": 8, **more}})
        response = server.client.post("/v1/completions", content=text, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["param"] == param


COMPLETION_REFUSALS = [
    ({"vllm_xargs": {"smc_particles": 8}}, 400, "smc_n_particles"),
    ({"vllm_xargs": {"smc_ignore_generation_config": True}}, 400, "smc_n_particles"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_no": 8}}, 400, "smc_no"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_potential_args": '{"a": 1}'}}, 400, "smc_potential_args"),
    ({"vllm_xargs": {"smc_n_particles": 300}}, 413, "max_particles"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_potential": "never"}}, 422, None),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_potential": "fails"}}, 500, None),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_intervention": "/etc/passwd"}}, 400, "smc_intervention"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_counterfactual": "ab"}}, 400, "smc_counterfactual"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_counterfactual": [5, 99]}}, 400, "smc_counterfactual"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_counterfactual": [5, 1, 6]}}, 400, "smc_counterfactual"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_counterfactual": [5], "smc_noise": 1}}, 400, "smc_noise"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_counterfactual": [5], "smc_facts": "a"}}, 400, "smc_facts"),
    ({"vllm_xargs": {"smc_n_particles": 8, "smc_keep_logits": "a"}}, 400, "smc_keep_logits"),
    ({"n": 9}, 400, "n"),
    ({"temperature": 0}, 400, "temperature"),
    ({"presence_penalty": 1.0}, 400, "presence_penalty"),
    ({"repetition_penalty": 1.2}, 400, "repetition_penalty"),
    ({"logprobs": 1}, 400, "logprobs"),
    ({"bad_words": ["a"]}, 400, "bad_words"),
    ({"use_beam_search": True}, 400, "use_beam_search"),
    ({"structured_outputs": {"regex": "a"}}, 400, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, 400, None),  # vLLM's own words, and the next two
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ({"stop_token_ids": [99999999]}, 400, "stop_token_ids"),
    ({"stop": "a", "skip_special_tokens": False}, 400, "skip_special_tokens"),
]


@pytest.mark.parametrize(("wrong", "status", "param"), COMPLETION_REFUSALS)
def test_completions_refuse(server, wrong, status, param):
    body = {**xargs({"n_particles": 8}), "prompt": PROMPT, "max_tokens": 4, **wrong}
    for path in ("/v1/completions", "/v1/chat/completions"):
        if path.startswith("/v1/chat"):
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            if "logprobs" in body:
                body["logprobs"] = True
        for stream in (False, True):
            if stream and "use_beam_search" in body:
                continue
            response = server.post(path, **body, stream=stream)
            if stream and response.status_code == 200:
                [*_, answer] = events(response)
                assert status in (422, 500)
            else:
                assert response.status_code == status, response.text
                answer = response.json()
            assert answer["error"]["code"] == status, answer
            if param is not None:
                assert param == answer["error"]["param"] and param in answer["error"]["message"], answer
    assert server.wait_idle()


def test_other_routes(server):
    """Every other route that takes vllm_xargs refuses ours, streaming or not, and says where to go."""
    keys = {"smc_n_particles": 8}
    messages = [{"role": "user", "content": "abc"}]
    sampling = {"max_tokens": 4, "extra_args": keys}
    routes = [
        ("/v1/responses", {"input": "abc", "max_output_tokens": 4, "vllm_xargs": keys}),
        ("/v1/messages", {"messages": messages, "max_tokens": 4, "vllm_xargs": keys}),
        ("/invocations", {"prompt": "abc", "max_tokens": 4, "vllm_xargs": keys}),
        ("/inference/v1/generate", {"token_ids": [5, 6], "sampling_params": sampling}),
    ]
    for path, body in routes:
        for stream in (False, True):
            response = server.post(path, model="tiny", **body, stream=stream)
            assert response.status_code == 400, (path, stream, response.text)
            message = response.json()["error"]["message"]
            assert "smc_n_particles" in message and "/v1/smc, /v1/completions, /v1/chat/completions" in message
    served = server.post("/v1/responses", model="tiny", input="abc", max_output_tokens=4)
    assert served.status_code == 200 and 0 < served.json()["usage"]["output_tokens"] <= 4


def test_ordinary_requests_are_untouched(server):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 2, "n": 1}
    answer = server.post("/v1/completions", **body).json()
    assert "smc" not in answer and answer["choices"][0]["logprobs"]["tokens"]
    chunks = events(server.post("/v1/completions", **body, stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == answer["choices"][0]["text"] and len(chunks) > 3


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves(server, stream):
    """Its group and its blocks are gone within 2 s."""
    slow = {"n_particles": 16, "max_tokens": 200, "ignore_eos": True, "potential": "slow"}
    routes = [("/v1/smc", {"prompt": PROMPT, **slow}), ("/v1/completions", {**xargs(slow), "prompt": PROMPT})]
    routes.append(("/v1/smc", {**routes[0][1], "counterfactual": [5] * 100, "intervention": "calm"}))
    routes[1][1]["vllm_xargs"].pop("smc_ignore_eos")
    chat = {name: value for name, value in routes[1][1].items() if name != "prompt"}
    routes.append(("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": PROMPT}]}))
    for path, body in routes:
        deadline = time.monotonic() + 1
        try:
            with server.client.stream("POST", path, json={**body, "stream": stream}, timeout=1) as response:
                for part in response.iter_raw():
                    assert response.status_code == 200, part
                    if time.monotonic() > deadline:
                        break
                else:
                    pytest.fail(f"{path}: it was over before")
        except httpx.ReadTimeout:
            pass
        assert server.wait_idle(), path


@pytest.mark.parametrize("stream", [False, True])
def test_aborted_by_the_operator(server, stream):
    """As vLLM says it on its own routes, as an error on /v1/smc; counted as aborted, and its blocks are free."""
    slow = {"n_particles": 16, "max_tokens": 100, "potential": "slow"}
    routes = [
        ("/v1/smc", {"prompt": PROMPT, **slow}, "smc-x"),
        ("/v1/completions", xargs(slow, prompt=PROMPT), "cmpl-x-0"),
    ]
    for path, body, request_id in routes:
        ended = {name: server.metric("fastsmc:groups_total", f'outcome="{name}"') for name in ("aborted", "finished")}
        headers, got = {"X-Request-Id": "x"}, []

        def ask(path=path, body=body, headers=headers, got=got):
            got.append(server.client.post(path, json={**body, "stream": stream}, headers=headers))

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.metric("fastsmc:groups_running") and thread.is_alive():
            time.sleep(0.01)
        assert server.post("/abort_requests", request_ids=[request_id]).json()["aborted"] == 1
        thread.join(10)
        [response] = got
        if path == "/v1/smc":
            answer = json.loads(response.text.splitlines()[-1])
            assert response.status_code == (200 if stream else 500)
            assert answer["error"]["code"] == 500 and "aborted" in answer["error"]["message"]
        else:
            assert response.status_code == 200 and "log_z" not in response.text
            assert stream or response.json()["choices"][0]["finish_reason"] == "abort"
        assert server.wait_idle()
        for name, count in ended.items():
            now = server.metric("fastsmc:groups_total", f'outcome="{name}"')
            assert now - count == (name == "aborted"), name


def test_twelve_clients_at_once(server):
    """Each gets what it gets alone: groups that share no pass, ordinary requests, and refusals between them."""
    ordinary = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    tasks = [("/v1/smc", {**TASK, **LEXICON, "seed": i, "alone": True}) for i in range(2)]
    asked = {"counterfactual": [5, 6, 7, 8], "intervention": "calm"}
    tasks += [("/v1/smc", {**TASK, **asked, "seed": i, "alone": True}) for i in range(2)]
    tasks += [("/v1/completions", xargs(**LEXICON, seed=i, alone=1, n=2)) for i in range(4)]
    tasks += [("/v1/completions", ordinary), ("/v1/completions", {**ordinary, "prompt": "xyz"})]
    tasks += [("/v1/smc", {**TASK, "n_particles": 0}), ("/v1/smc", {**TASK, "potential": "fails"})]

    def core(path, body):
        answer = server.post(path, **body).json()
        for key in ("id", "created"):
            answer.pop(key, None)
        return answer

    alone = [core(*task) for task in tasks]
    together = [None] * len(tasks)

    def run(i):
        together[i] = core(*tasks[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and server.wait_idle()


def test_too_many_wait(server):
    """More than max_groups waiting: 503 with Retry-After, for those that came last; the others are served."""
    body = {"prompt": PROMPT, "n_particles": 128, "max_tokens": 20, "ignore_eos": True, "potential": "slow"}
    results = []

    def run(i):
        response = server.post("/v1/smc", **body, seed=i)
        results.append((response.status_code, response.headers.get("retry-after"), response.text[:300]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(MAX_GROUPS + 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    busy = [retry for status, retry, _ in results if status == 503]
    assert busy, results
    assert all(int(retry) >= 1 for retry in busy)
    assert {status for status, *_ in results} == {200, 503} and len(busy) <= 4
    assert server.wait_idle()


def test_weights_are_numbers(server):
    answer = server.smc(**TASK, **LEXICON)
    assert math.isclose(sum(p["weight"] for p in answer["particles"]), 1.0)
    assert answer["log_z_is_minus_inf"] is False and all(p["log_weight"] is not None for p in answer["particles"])
