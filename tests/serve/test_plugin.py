"""What the plug-in does to a process, without a server."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastsmc import cli


def test_inert_unless_named(environment):
    """Where VLLM_PLUGINS does not name it, vLLM stays as it was; it looks so itself, as vLLM loads it all the same."""
    script = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "import os, sys; from vllm.engine.arg_utils import EngineArgs\n"
        "plugin = sys.modules['fastsmc.vllm.serve.plugin']\n"
        "print(hasattr(EngineArgs.create_engine_config, 'smc_stock'), 'fastsmc.vllm.llm' in sys.modules)\n"
        "os.environ['VLLM_PLUGINS'] = 'other,fastsmc'; plugin.activate(); first = EngineArgs.create_engine_config\n"
        "plugin.activate(); print(hasattr(first, 'smc_stock'), EngineArgs.create_engine_config is first)"
    )
    plain = {name: value for name, value in environment.items() if name != "VLLM_PLUGINS"}
    done = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-2:] == ["False False", "True True"], done.stderr


def test_settings(monkeypatch, letters_model, calm):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    from fastsmc.vllm.serve import plugin
    from fastsmc.vllm.starting import engine_args

    monkeypatch.setenv("VLLM_PLUGINS", "fastsmc")
    monkeypatch.setattr(plugin.os, "environ", {**plugin.os.environ})
    ours, model = engine_args({}), {"model": str(letters_model)}
    arguments = EngineArgs(**model)
    plugin.put_settings(arguments)
    assert {name: getattr(arguments, name) for name in ours} == ours
    plugin.put_settings(arguments)  # of an engine that has been set up already
    own = EngineArgs(**model, max_num_seqs=7, block_size=64)
    plugin.put_settings(own)
    assert (own.max_num_seqs, own.block_size, own.scheduler_cls) == (7, 64, ours["scheduler_cls"])
    for name in ("scheduler_cls", "worker_cls"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} mine: fastsmc sets it itself"):
            plugin.put_settings(EngineArgs(**model, **{name: "mine"}))
    with pytest.raises(ValueError, match="unknown option; max_groups"):
        plugin.put_settings(EngineArgs(**model, additional_config={"fastsmc": {"max_group": 1}}))
    plugin.put_settings(EngineArgs(**model, data_parallel_size=2))
    for name in ("offline", "interventions"):  # one opens directories to whoever asks, the other is of no use there
        own = {**model, "additional_config": {"fastsmc": {name: True}}}
        plugin.put_settings(EngineArgs(**own))
        with pytest.raises(ValueError, match=rf"fastsmc.{name}=True: is fastsmc.LLM's alone"):
            plugin.put_settings(AsyncEngineArgs(**own))
    named = {**model, "additional_config": {"fastsmc": {"interventions": {"calm": str(calm)}}}}
    plugin.put_settings(AsyncEngineArgs(**named))
    named["additional_config"]["fastsmc"]["interventions"]["storm"] = "/no/such"
    with pytest.raises(ValueError, match=r"interventions\['storm'\]='/no/such': .*No such file"):
        plugin.put_settings(AsyncEngineArgs(**named))


def test_names_of_the_front_end_are_probed_where_there_is_one(monkeypatch, letters_model):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    from fastsmc.vllm import compat, names
    from fastsmc.vllm.serve import plugin

    monkeypatch.setattr(plugin.os, "environ", {**plugin.os.environ})
    monkeypatch.setattr(compat, "check_names", compat.check_names.__wrapped__)  # without the cache
    server, offline = AsyncEngineArgs(str(letters_model)), EngineArgs(str(letters_model))
    plugin.put_settings(server)
    monkeypatch.setattr(names, "CALLS", names.CALLS | {"vllm.no_such_front_end:route": ()})
    monkeypatch.setattr(names, "ONLY", names.ONLY | {"vllm.no_such_front_end": "server"})
    plugin.put_settings(offline)
    with pytest.raises(compat.UnsupportedError, match="lacks what fastsmc uses: vllm.no_such_front_end:route$"):
        plugin.put_settings(server)


def test_streams_hold_no_payloads():
    """From vLLM 0.33 on, a stream's chunks hold the kv_transfer_params that its handler gets."""
    import asyncio
    from types import SimpleNamespace

    from fastsmc.vllm.serve.routes import _Client

    class Client:
        async def generate(self, *args, smc_record):
            yield SimpleNamespace(kv_transfer_params={"smc": {}})

    async def get(stream):
        return [output.kv_transfer_params async for output in _Client(Client(), stream).generate("a", None, "id")]

    assert asyncio.run(get(True)) == [None] and asyncio.run(get(False)) == [{"smc": {}}]


def test_max_tokens_of_who_says_none():
    """vLLM's default, as far as the cap and the operator's limit allow: never more than would be refused."""
    from types import SimpleNamespace

    from fastsmc.vllm.options import EngineOptions
    from fastsmc.vllm.serve.routes import DEFAULT_MAX_TOKENS, _Client, unsaid_tokens

    body, limited = {"vllm_xargs": {"smc_n_particles": 64}}, EngineOptions(max_particle_tokens=512)
    assert unsaid_tokens(body, EngineOptions()) == DEFAULT_MAX_TOKENS == 256
    assert unsaid_tokens(body | {"max_tokens": None}, limited) == 8
    assert unsaid_tokens({"vllm_xargs": {"smc_n_particles": 1}}, limited) == 256
    assert unsaid_tokens({"vllm_xargs": {"smc_n_particles": 1024}}, limited) == 1  # refused for its N
    for name in ("max_tokens", "max_completion_tokens"):
        assert unsaid_tokens(body | {name: 100}, limited) is None
    client = SimpleNamespace(generate=lambda prompt, params, request_id, smc_record: params.max_tokens)
    for most, default, expected in ((8, 16, 8), (256, 16, 16), (None, 300, 300)):
        params = SimpleNamespace(max_tokens=default)
        assert _Client(client, False, most).generate("a", params, "id") == expected


def test_a_counterfactual_group_has_one_row_more():
    """So says the front end, before an engine is asked."""
    from types import SimpleNamespace

    from vllm import SamplingParams

    from fastsmc import SMCParams
    from fastsmc.vllm.llm import LLM
    from fastsmc.vllm.serve.errors import GroupError
    from fastsmc.vllm.serve.outputs import check

    config = SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(get_vocab_size=lambda: 8, skip_tokenizer_init=False, max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=64),
        cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16),
    )
    for n, text, param in ((15, [5], None), (16, [5], "n_particles"), (16, None, None), (4, [9], "smc_counterfactual")):
        params: SamplingParams = LLM.lead_params(SMCParams(n_particles=n), counterfactual=text)
        request = SimpleNamespace(sampling_params=params, prompt_token_ids=[1])
        if param is None:
            check(request, config, None)
            continue
        with pytest.raises(GroupError) as caught:
            check(request, config, None)
        assert (caught.value.param, caught.value.http_status) == (param, 400)


def test_restarted_group():
    """What was sent stays true, or the stream ends with an error and nothing more; steps begin anew after a mark."""
    import asyncio
    import json
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from fastsmc.vllm.serve.errors import GroupError
    from fastsmc.vllm.serve.outputs import Choices, Record
    from fastsmc.vllm.serve.routes import _lines, _with_last

    def output(new, samples=None):
        reasons = None if samples is None else ["length"] * len(samples)
        payload = {"sample_token_ids": samples, "sample_finish_reasons": reasons}
        first = SimpleNamespace(token_ids=new)
        return SimpleNamespace(
            request_id="a", prompt_token_ids=[1], finished=samples is not None, outputs=[first],
            kv_transfer_params={"smc": payload},
        )  # fmt: skip

    params = SamplingParams(max_tokens=8, output_kind=RequestOutputKind.DELTA, detokenize=False)
    begun, other = output([5, 6]), output([], [[5, 6, 7], [5, 8, 7]])
    choices = Choices(2, None, params, begun)
    choices.extend(begun)
    assert [choice.token_ids for choice in begun.outputs] == [[5, 6], [5, 6]]
    with pytest.raises(GroupError, match="no longer begin with what was streamed"):
        choices.extend(other)
    same = output([], [[5, 6, 7], [5, 6]])
    choices.extend(same)
    assert [(choice.token_ids, choice.finish_reason) for choice in same.outputs] == [([7], "length"), ([], "length")]

    async def collect(stream):
        return [part async for part in stream]

    async def chunks():
        for chunk in ('data: {"choices": []}', 'data: {"usage": {}}', "data: [DONE]"):
            yield chunk + "\n\n"

    for error in (None, GroupError(500, "restarted")):
        *_, last, done = asyncio.run(collect(_with_last(chunks(), [Record({"particle_tokens": 1}, error)])))
        assert ("restarted" in last) == (error is not None) == ("usage" not in last) and done == "data: [DONE]\n\n"

    async def outputs():
        for steps in ([1, 2], [1], [2, 3]):
            payload = {"progress": [{"step": step} for step in steps]}
            yield SimpleNamespace(kv_transfer_params={"smc": payload}, finished=steps == [2, 3])

    async def lines():
        stream = outputs()
        return await collect(_lines(await anext(stream), stream, dict))

    events = [json.loads(line) for line in asyncio.run(lines())]
    assert [event.get("step", event["event"]) for event in events] == [1, 2, "restart", 1, 2, 3, "population"]


def test_a_client_that_leaves_before_the_first_chunk():
    """Nobody asks for the body then; what is on its way all the same ends."""
    import asyncio

    from fastsmc.vllm.serve.routes import _Stream

    ended = []

    async def chunks():
        try:
            await asyncio.sleep(60)
            yield ""
        finally:
            ended.append("chunks")

    async def leave():
        rest = chunks()
        first = asyncio.ensure_future(anext(rest))
        await asyncio.sleep(0)

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            raise OSError("the client is gone")

        with pytest.raises(BaseException):  # noqa: B017 - which one is Starlette's affair
            await _Stream(first, rest, 0.0)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        await asyncio.wait([first], timeout=5)
        return first.cancelled()

    assert asyncio.run(leave()) and ended == ["chunks"]


def test_serve_command(monkeypatch):
    """The command names the plug-in, finds the model, serves it by its name, and hands on vLLM's flags."""
    from fastsmc import models
    from fastsmc.vllm.serve import launch

    calls = []
    monkeypatch.setattr(launch, "serve", lambda model, flags: calls.append((model, flags)))
    monkeypatch.setattr(launch.os, "environ", {"VLLM_PLUGINS": "other"})
    monkeypatch.setitem(models.MODELS, "smollm2", lambda say: "/models/small")
    flags = ["--port", "1", "-tp", "2", "--additional-config.fastsmc.max_groups=3"]
    assert cli.main(["serve", "smollm2", *flags]) == 0
    assert cli.main(["serve", "smollm2", "--served_model_name=mine"]) == cli.main(["serve", "org/other"]) == 0
    assert calls == [
        ("/models/small", [*flags, "--served-model-name", "smollm2"]),
        ("/models/small", ["--served_model_name=mine"]),
        ("org/other", []),
    ]
    assert launch.os.environ["VLLM_PLUGINS"] == "other,fastsmc"
    launch.os.environ.clear()
    launch.name_plugin()
    assert launch.os.environ["VLLM_PLUGINS"].split(",")[-1] == "fastsmc"
    assert "lora_filesystem_resolver" in launch.os.environ["VLLM_PLUGINS"]  # loaded where nothing is named
