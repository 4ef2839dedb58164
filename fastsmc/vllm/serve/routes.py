"""The HTTP routes: POST /v1/smc, and vLLM's own two in which `smc_*` keys of `vllm_xargs` ask for groups.

vLLM's handlers do the work of theirs, prompts and answers, over an engine client that knows groups
(`fastsmc.vllm.serve.outputs`). What is added: the defaults that a group cannot take are set aside, a refusal has its
status in streams too, and each prompt's summary is in the answer, as `smc`, of a stream in its last chunk. Every other
route refuses those keys; /v1/responses does so here, since vLLM's begins a stream before it asks its engine client.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as responses_router
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.sampling_params import RequestOutputKind

from fastsmc.counterfactuals import Counterfactuals
from fastsmc.params import GROUP_KEY, PREFIX
from fastsmc.texts import texts_after
from fastsmc.vllm.llm import LLM, read_population
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.serve.errors import GroupError, answer_error, with_own_names
from fastsmc.vllm.serve.outputs import Record, elsewhere
from fastsmc.vllm.serve.schemas import SMCPopulation, SMCRequest

#: tokens of a completion or chat completion that says no max_tokens
DEFAULT_MAX_TOKENS = 256
#: the key by which a client declines the defaults of the model's generation_config.json
IGNORE = PREFIX + "ignore_generation_config"
#: vLLM's defaults that change p0 in ways a group does not know; a server's are not taken
_UNSUPPORTED = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def attach(app: FastAPI) -> None:
    """Adds the routes to vLLM's app; they replace its own of the same path."""
    app.exception_handler(GroupError)(answer_error)
    json_only = [Depends(validate_json_request)]
    errors: dict[int | str, dict[str, Any]] = {code: {"model": ErrorResponse} for code in (400, 413, 422, 500, 503)}
    sse: dict[str, Any] = {"content": {"text/event-stream": {}}}
    lines: dict[str, Any] = {"model": SMCPopulation, "content": {"application/x-ndjson": {}}}
    app.post("/v1/smc", dependencies=json_only, responses={200: lines, **errors})(smc)
    app.post("/v1/completions", dependencies=json_only, responses={200: sse, **errors})(completions)
    app.post("/v1/chat/completions", dependencies=json_only, responses={200: sse, **errors})(chat_completions)
    app.post("/v1/responses", dependencies=json_only, responses={200: sse, **errors})(responses)


# --------------------------------------------------------------------------------------------------------- /v1/smc
@with_cancellation
@load_aware_call
async def smc(body: SMCRequest, raw_request: Request) -> Response:
    """Runs one group of particles and answers with its weighted population."""
    state = raw_request.app.state
    handler, inputs, lora = await _render(body, state)
    try:
        params = LLM.lead_params(
            body.params(), body.potential, exact=body.exact, alone=body.alone, return_population=True
        )
    except ValueError as error:
        raise GroupError.refusal(error) from None
    more: dict[str, Any] = {
        "n_samples": body.n_samples,
        "potential_args": json.dumps(body.potential_args),
        "progress": body.stream,
    }
    for name in ("twist", "intervention", "counterfactual", "factual_temperature", "noise"):
        if (value := getattr(body, name)) is not None:
            more[name] = value
    params.extra_args = {**(params.extra_args or {}), **{PREFIX + name: value for name, value in more.items()}}
    params.output_kind = RequestOutputKind.CUMULATIVE if body.stream else RequestOutputKind.FINAL_ONLY
    # vLLM wants it with stop strings; the population's texts come at the end
    params.detokenize = params.stop is not None
    request_id = f"smc-{handler._base_request_id(raw_request)}"
    record = Record()
    outputs = state.engine_client.generate(
        inputs,
        params,
        request_id,
        lora_request=lora,
        trace_headers=await handler._get_trace_headers(raw_request.headers),
        data_parallel_rank=handler._get_data_parallel_rank(raw_request),
        smc_record=record,
    )

    def answer() -> dict[str, Any]:
        if not record.payload:
            raise GroupError(500, "the request was aborted", outcome="aborted")
        tokenizer = state.engine_client.renderer.tokenizer
        population = read_population(record.payload, tokenizer)
        head = {"id": request_id, "object": "smc.population", "created": int(time.time())}
        head["model"] = handler.models.model_name(lora)
        return head | population_body(population, record.payload, body.return_genealogy, tokenizer)

    try:
        if not body.stream:
            async for _ in outputs:
                pass
            return JSONResponse(answer())
        first = await anext(outputs)  # a refusal, which comes before any output, has its status
    except GroupError as error:
        raise with_own_names(error, SMCRequest.model_fields) from None
    return StreamingResponse(_lines(first, outputs, answer), media_type="application/x-ndjson")


async def _render(body: Any, state: Any) -> tuple[Any, Any, Any]:
    """Returns the handler of vLLM's that read the prompt, what it made of it, and the LoRA adapter or None."""
    common = {"model": body.model, "max_tokens": body.max_tokens}
    handler: Any
    wish: Any
    if body.messages is not None:
        handler, wish = state.openai_serving_chat, ChatCompletionRequest(messages=body.messages, **common)
        result = await handler.render_chat_request(wish)
        inputs = result if isinstance(result, ErrorResponse) else result[1]
    else:
        handler, wish = state.openai_serving_completion, CompletionRequest(prompt=body.prompt, **common)
        inputs = await handler.render_completion_request(wish)
    if isinstance(inputs, ErrorResponse):
        raise GroupError(inputs.error.code, inputs.error.message, inputs.error.param)
    return handler, inputs[0], handler._maybe_get_adapters(wish)


async def _lines(first: Any, outputs: AsyncIterator[Any], answer: Callable[[], dict[str, Any]]) -> AsyncIterator:
    """Yields the lines of a stream: steps, then the population or an error. A preempted group begins anew."""
    output, last = first, 0
    try:
        while True:
            for step in (output.kv_transfer_params or {}).get("smc", {}).get("progress", ()):
                if step["step"] <= last:
                    yield json.dumps({"event": "restart"}) + "\n"
                last = step["step"]
                yield json.dumps({"event": "step", **step}, allow_nan=False) + "\n"
            if output.finished:
                yield json.dumps({"event": "population", **answer()}, allow_nan=False) + "\n"
                return
            output = await anext(outputs)
    except Exception as error:
        yield json.dumps({"event": "error", **_known(error).body()}, allow_nan=False) + "\n"


def _known(error: Exception) -> GroupError:
    known = error if isinstance(error, GroupError) else GroupError(500, f"{type(error).__name__}: {error}")
    return with_own_names(known, SMCRequest.model_fields)


def population_body(population: Any, payload: dict[str, Any], genealogy: bool, tokenizer: Any) -> dict[str, Any]:
    """Returns a population as /v1/smc answers with it, in plain JSON values."""
    n_prompt, n_tokens = len(population.prompt_token_ids), sum(map(len, population.token_ids))
    columns = zip(
        population.texts or [None] * population.n_particles,
        population.token_ids,
        population.weights.tolist(),
        population.log_weights.tolist(),
        population.log_probs.tolist(),
        population.finish_reasons,
        strict=True,
    )
    body: dict[str, Any] = {
        "log_z": _finite(population.log_z),
        "log_z_is_minus_inf": _finite(population.log_z) is None,
        **{name: payload[name] for name in ("log_z_stderr", "log_z_stderr_reason", "distinct_roots")},
        **{name: payload[name] for name in ("questions", "biased") if name in payload},
        "ess": population.final_ess,
        "steps": population.T,
        "seed": population.params.seed,
        "p0": payload["p0"],
        "particles": [
            {
                "text": text,
                "token_ids": token_ids,
                "weight": weight,
                "log_weight": _finite(log_weight),
                "log_prob": _finite(log_prob),
                "finish_reason": reason,
            }
            for text, token_ids, weight, log_weight, log_prob, reason in columns
        ],
        "samples": payload["samples"],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": n_prompt + n_tokens,
            "particle_tokens": payload["particle_tokens"],
        },
    }
    if population.segments is not None:
        body["boundaries"] = population.boundaries.tolist()
        for particle, segments in zip(body["particles"], population.segments.tolist(), strict=True):
            particle["segments"] = segments
    if isinstance(population, Counterfactuals):
        columns = zip(population.common_prefix.tolist(), population.log_kernel.tolist(), strict=True)
        for particle, (prefix, kernel) in zip(body["particles"], columns, strict=True):
            particle |= {"common_prefix": prefix, "log_kernel": _finite(kernel)}
        ids = population.factual_ids
        text = None if tokenizer is None else texts_after(tokenizer, population.prompt_token_ids, [ids])[0]
        body["counterfactual"] = {
            "token_ids": ids,
            "text": text,
            "log_probs": population.factual_log_probs.tolist(),
            "stay": population.stay.tolist(),
            "survival": population.survival.tolist(),
            "expected_common_prefix": population.expected_common_prefix,
        }
    if genealogy:
        body["genealogy"] = {
            "ancestors": population.ancestors.tolist(),
            "tokens": population.tokens.tolist(),
            "token_texts": token_texts(tokenizer, population.tokens),
        }
    return body


def token_texts(tokenizer: Any, tokens: Any) -> dict[int, str]:
    """Spells each different token of an array of ids, -1 apart; nothing without a tokenizer."""
    if tokenizer is None:
        return {}
    return {token: tokenizer.decode([token]) for token in sorted({*tokens.ravel().tolist()} - {-1})}


def _finite(value: float) -> float | None:
    return value if value > float("-inf") else None


# -------------------------------------------------------------------------------------------- vLLM's own two routes
async def completions(request: CompletionRequest, raw_request: Request) -> Response:
    """Is vLLM's /v1/completions; with `smc_*` keys each prompt is a group, and n are draws from its population."""
    if not _asks_for_group(request):
        return await completion_router.create_completion(request, raw_request)
    return await _with_groups(request, raw_request, completion_router.completion(raw_request), "create_completion")


async def chat_completions(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """Is vLLM's /v1/chat/completions; with `smc_*` keys the answer is a draw from a group's population."""
    if not _asks_for_group(request):
        return await chat_router.create_chat_completion(request, raw_request)
    return await _with_groups(request, raw_request, chat_router.chat(raw_request), "create_chat_completion")


async def responses(request: ResponsesRequest, raw_request: Request) -> Response:
    """Is vLLM's /v1/responses, which has no groups."""
    if _asks_for_group(request):
        raise elsewhere(request.vllm_xargs or ())
    return await responses_router.create_responses(request, raw_request)


def _asks_for_group(request: Any) -> bool:
    return any(key.startswith(PREFIX) for key in request.vllm_xargs or ())


def settle_defaults(request: Any) -> None:
    """Puts into a request what a group needs said, so that vLLM takes no default for it that a group cannot have.

    The server's default temperature, top_k, top_p and min_p hold as for any client, unless the client declines them;
    its penalties do not.

    Raises:
        GroupError: what groups do not do.
    """
    if request.use_beam_search:
        raise GroupError(400, "use_beam_search=True: a group of particles is not beam search", "use_beam_search")
    n, keys = request.n or 1, request.vllm_xargs
    if isinstance(most := keys.get(GROUP_KEY), int) and n > max(most, 1):
        raise GroupError(400, f"n={n}: at most {GROUP_KEY}={most}, since n are draws from one population", "n")
    ignore = keys.get(IGNORE, False)
    if GROUP_KEY in keys:  # else there is no group, which has its own refusal as long as any key is there
        keys.pop(IGNORE, None)
    if ignore not in (True, False, "true", "false"):
        raise GroupError(400, f"{IGNORE}={ignore!r}: must be true or false", IGNORE)
    ignored = request._DEFAULT_SAMPLING_PARAMS if ignore in (True, "true") else _UNSUPPORTED
    for name in ignored:
        if getattr(request, name) is None:
            setattr(request, name, request._DEFAULT_SAMPLING_PARAMS[name])


def unsaid_tokens(body: Mapping[str, Any], options: EngineOptions) -> int | None:
    """Returns the most tokens that a group has whose request says no max_tokens; None: this one says it.

    vLLM's own default holds (16, or of a chat the rest of the context) as far as it is at most `DEFAULT_MAX_TOKENS` and
    the operator's limit on particle tokens allows it.

    Args:
        body: as the client sent it; in what vLLM has read of it, its default cannot be told from the client's word.
    """
    if any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens")):
        return None
    n, most = body["vllm_xargs"].get(GROUP_KEY), options.max_particle_tokens
    share = most // n if most and isinstance(n, int) and n > 0 else DEFAULT_MAX_TOKENS
    return max(1, min(DEFAULT_MAX_TOKENS, share))


class _Client:
    """Is an engine client that keeps a `Record` of each group request, in order of the prompts.

    A group has at most `max_tokens`, where that is not None. For a stream the outputs of a group that has failed just
    end: vLLM's handlers would log each with a traceback.
    """

    def __init__(self, client: Any, stream: bool, max_tokens: int | None = None) -> None:
        self._client, self._stream, self._max_tokens = client, stream, max_tokens
        self.records: list[Record] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, params: Any, request_id: str, **kwargs: Any) -> AsyncGenerator:
        if self._max_tokens is not None:
            params.max_tokens = min(params.max_tokens, self._max_tokens)
        self.records.append(Record())
        outputs = self._client.generate(prompt, params, request_id, smc_record=self.records[-1], **kwargs)
        return _quiet(outputs) if self._stream else outputs


async def _quiet(outputs: AsyncGenerator) -> AsyncGenerator:
    with contextlib.suppress(GroupError):
        async for output in outputs:
            output.kv_transfer_params = None  # vLLM 0.33 would send it, and the record has it
            yield output


@with_cancellation
@load_aware_call
async def _with_groups(request: Any, raw_request: Request, handler: Any, method: str) -> Response:
    """Has vLLM's handler answer a request whose prompts are groups."""
    if handler is None:
        raise NotImplementedError("this server's model does not do that")
    settle_defaults(request)
    options = EngineOptions.of(handler.engine_client.vllm_config.additional_config)
    most = unsaid_tokens(await raw_request.json(), options)
    client, handler = _Client(handler.engine_client, request.stream, most), copy.copy(handler)
    handler.engine_client = client
    result = await getattr(handler, method)(request, raw_request)
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), status_code=result.error.code)
    if not request.stream:
        return JSONResponse(_with_summaries(result.model_dump(), client.records))
    chunks = _with_last(result, client.records)
    begin = asyncio.ensure_future(anext(chunks))
    signs = [asyncio.ensure_future(record.begun.wait()) for record in client.records]
    try:
        await asyncio.wait([begin, *signs], return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        begin.cancel()
        raise
    finally:
        for sign in signs:
            sign.cancel()
    if error := _first_error(client.records):
        begin.cancel()
        raise error
    interval = float(getattr(raw_request.app.state.args, "sse_keep_alive_interval", 0))
    return _Stream(begin, chunks, interval)


class _Stream(StreamingResponse):
    """Sends a stream whose first chunk is on its way already, and ends it whatever becomes of the client."""

    def __init__(self, first: asyncio.Future, rest: AsyncGenerator[str, None], interval: float) -> None:
        self._first = first
        super().__init__(with_sse_keep_alive(_chain(first, rest), interval), media_type="text/event-stream")

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:  # a client may be gone before anything of the body was asked for
            self._first.cancel()


async def _chain(first: asyncio.Future, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield await first
        async for chunk in rest:
            yield chunk
    finally:
        await rest.aclose()


async def _with_last(chunks: AsyncGenerator[str, None], records: list[Record]) -> AsyncGenerator[str, None]:
    """Puts the summaries into the last chunk of a stream of server-sent events, or an error after it."""
    held = None  # the last chunk that holds anything, once the groups have ended
    try:
        async for chunk in chunks:
            if chunk.startswith("data: [DONE]"):
                if error := _first_error(records):
                    held = None  # what is in it, the usage say, is of no answer
                    yield _event(error.body())
                elif held is not None:
                    held = _event(_with_summaries(json.loads(held.removeprefix("data: ")), records))
            if held is not None:
                yield held
            held = chunk if all(record.payload for record in records) else None
            if held is None:
                yield chunk
        if held is not None:
            yield held
    finally:
        await chunks.aclose()


def _first_error(records: list[Record]) -> GroupError | None:
    return next((record.error for record in records if record.error is not None), None)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _with_summaries(body: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    """Adds each prompt's summary, and to the usage the tokens of all particles."""
    body["smc"] = [record.summary for record in records]
    if body.get("kv_transfer_params"):  # where vLLM has the first prompt's
        body["kv_transfer_params"]["smc"] = body["smc"][0]
    if body.get("usage"):
        body["usage"]["particle_tokens"] = sum(record.payload.get("particle_tokens", 0) for record in records)
    return body
