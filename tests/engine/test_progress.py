"""What a group request's outputs say beside its sample: steps, tokens as they become final, several samples, errors."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableTwist, value_table
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from fastsmc import SMCParams
from fastsmc.smc.group import choose

from .conftest import VOCAB
from .test_engine import EVERY_STEP, Broken, Impossible

POTENTIAL = TableTwist(3 * value_table(100, VOCAB))
#: few particles soon have a common ancestor
FEW = dataclasses.replace(EVERY_STEP, n_particles=4)


def outputs_of(engine, params, potential=None, between=lambda count: None, **extra):
    """All outputs of one group request, in the deltas that a stream gets, and its population."""
    name = None if potential is None else engine.register_potential(potential)
    request = engine.lead_params(params, name, return_population=True)
    request.extra_args |= {f"smc_{key}": value for key, value in extra.items()}
    request.output_kind = RequestOutputKind.DELTA
    engine.llm_engine.add_request(str(next(engine.request_counter)), engine._prompt(PROMPT), request)
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        outputs += engine.llm_engine.step()
        between(len(outputs))
    if name is not None:
        engine.drop_potential(name)
    payloads = [json.loads(json.dumps(o.kv_transfer_params["smc"], allow_nan=False)) for o in outputs]
    return outputs, payloads


def tokens_of(outputs):
    return [token for output in outputs for token in output.outputs[0].token_ids]


def test_progress_and_samples(engine, all_blocks_back):
    """Every step once, as the population's record has it; the samples are those of the weights, and the first is the
    request's own text; without the key, outputs are as they were."""
    params = SMCParams(n_particles=16, max_tokens=30, ess_threshold=0.7, stop_token_ids=[5], seed=4)
    outputs, payloads = outputs_of(engine, params, POTENTIAL, progress=True, n_samples=9)
    population = engine.population(outputs[-1])
    steps = [step for payload in payloads for step in payload["progress"]]
    assert [step["step"] for step in steps] == list(range(1, payloads[-1]["steps"] + 1))
    assert [step["ess"] for step in steps] == population.ess[: len(steps)].tolist()
    assert [step["resampled"] for step in steps] == population.resampled[: len(steps)].tolist()
    assert any(step["resampled"] for step in steps) and any(0 < step["finished"] < 16 for step in steps)
    last = payloads[-1]
    assert last["samples"] == choose(torch.from_numpy(population.log_weights), params, 9)
    assert last["chosen"] == last["samples"][0] and len(set(last["samples"])) > 1
    assert last["sample_token_ids"] == [population.token_ids[i] for i in last["samples"]]
    assert last["sample_finish_reasons"] == ["stop" if ids[-1] == 5 else "length" for ids in last["sample_token_ids"]]
    assert tokens_of(outputs) == last["sample_token_ids"][0]
    assert outputs[-1].outputs[0].finish_reason == last["sample_finish_reasons"][0]
    assert last["particle_tokens"] == int((population.tokens >= 0).sum())
    outputs, payloads = outputs_of(engine, params, POTENTIAL)
    assert all(set(payload) == {"step"} for payload in payloads[:-1]) and "progress" not in payloads[-1]
    assert len(payloads[-1]["samples"]) == 1 and all(not o.outputs[0].token_ids for o in outputs[:-1])
    for wrong in (0, 17, "many", 1.5, True):
        with pytest.raises(ValueError, match="smc_n_samples="):
            request = engine.lead_params(params)
            request.extra_args["smc_n_samples"] = wrong
            engine.generate({"prompt_token_ids": PROMPT}, request, use_tqdm=False)


def test_tokens_as_they_become_final(engine, scheduler, all_blocks_back):
    """They come before the end, and with the rest they are the sample, also where the group begins anew after some;
    where it then has others, it ends with an error instead of a text that is torn."""
    want, _ = outputs_of(engine, FEW, POTENTIAL)
    outputs, _ = outputs_of(engine, FEW, POTENTIAL, stream_tokens=True)
    assert tokens_of(outputs) == tokens_of(want)
    early = [len(o.outputs[0].token_ids) for o in outputs[:-1]]
    assert sum(n > 0 for n in early) > 3 and outputs[-1].outputs[0].token_ids

    def begin_anew(count, change=0):
        group = next(iter(scheduler._groups.values()), None)
        if count == 6 and group.epoch == 0:
            assert len(group.sent) > 5
            group.sent[2] = (group.sent[2] + change) % VOCAB
            assert scheduler.reset_prefix_cache(reset_running_requests=True)

    outputs, payloads = outputs_of(engine, FEW, POTENTIAL, begin_anew, stream_tokens=True)
    assert tokens_of(outputs) == tokens_of(want) and len(payloads) > len(early) + 1
    otherwise = functools.partial(begin_anew, change=1)
    outputs, payloads = outputs_of(engine, FEW, POTENTIAL, otherwise, stream_tokens=True)
    assert payloads[-1]["error_kind"] == "engine" and "began anew" in payloads[-1]["error"]
    assert outputs[-1].outputs[0].finish_reason == "error"


def test_errors_have_a_kind(engine, all_blocks_back):
    """Impossible targets bring their summary and population; a failed group what it has to say of its steps."""
    outputs, payloads = outputs_of(engine, EVERY_STEP, Impossible(), progress=True, n_samples=2)
    last, population = payloads[-1], engine.population(outputs[-1])
    assert last["error_kind"] == "impossible" and "weight zero" in last["error"] and population.degenerate
    assert last["log_z"] is None and last["log_z_is_minus_inf"] is True and last["ess"] == 0 and last["samples"] == []
    steps = [step for payload in payloads for step in payload["progress"]]
    assert steps[-1]["log_z"] is None and steps[-1]["ess"] == 0 and len(steps) == last["steps"]
    assert np.isfinite(steps[0]["log_z"])
    _, payloads = outputs_of(engine, EVERY_STEP, Broken("raises"), progress=True)
    assert payloads[-1]["error_kind"] == "potential" and "KeyError" in payloads[-1]["error"]
    assert [step["step"] for step in payloads[-1]["progress"]] == [1, 2]
    request = SamplingParams(max_tokens=8, extra_args={"smc_n_particles": 4, "smc_potential": "nobody"})
    engine.llm_engine.add_request(str(next(engine.request_counter)), engine._prompt(PROMPT), request)
    while engine.llm_engine.has_unfinished_requests():
        final = engine.llm_engine.step()
    assert final[-1].kv_transfer_params["smc"]["error_kind"] == "refused"
