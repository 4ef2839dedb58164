"""Group requests in the front end: checked before they are sent, and answered as vLLM's handlers know it.

    with_checks     around InputProcessor.process_inputs: what can never run is refused, with its HTTP status
    with_groups     around AsyncLLM.generate: n is draws from one population, and a group's error is raised; routes that
                    know nothing of groups have none
    with_progress   around RequestOutput.add: where two outputs become one, no step is lost

Requests without `smc_*` keys go straight to vLLM's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from types import SimpleNamespace
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from fastsmc.params import GROUP_KEY, PREFIX
from fastsmc.potentials import token_list
from fastsmc.vllm.capacity import Limits
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.request import GroupRequest, OverLimit, is_group_request, with_token_ids
from fastsmc.vllm.serve.errors import GroupError
from fastsmc.vllm.serve.metrics import NOT_STARTED, front_end_metrics

#: where groups of particles are asked for
ROUTES = ("/v1/smc", "/v1/completions", "/v1/chat/completions")


# -------------------------------------------------------------------------------------------------------- coming in
def with_checks(stock: Callable) -> Callable:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        request = stock(self, request_id, prompt, params, *args, **kwargs)
        if is_group_request(request.sampling_params):
            check(request, self.vllm_config, self.tokenizer)
        return request

    return process_inputs


def check(request: Any, config: Any, tokenizer: Any) -> None:
    """Refuses a group request, as vLLM sends it to its engine, that the engine with this VllmConfig would refuse.

    Texts among its potential's arguments that only a tokenizer can read become token ids.

    The number of KV blocks is that of all replicas together; where one has too few, its scheduler refuses.

    Raises:
        GroupError: 400, or 413 where the operator set the limit.
    """
    options = EngineOptions.of(config.additional_config)
    vocab_size = config.model_config.get_vocab_size()
    try:
        request.sampling_params.extra_args = with_token_ids(request.sampling_params.extra_args, options, tokenizer)
        asked = GroupRequest.parse(request.sampling_params)
        asked.check_allowed(options)
        if not request.prompt_token_ids:
            raise ValueError("prompt: a group of particles needs at least one prompt token, and no embeddings")
        asked.check_ids(vocab_size, not config.model_config.skip_tokenizer_init)
        token_list("prompt", request.prompt_token_ids, vocab_size)
        asked.check_fits(len(request.prompt_token_ids), asked.lookahead(options), Limits.of(config))
    except OverLimit as error:
        raise GroupError(413, str(error), error.limit, outcome="limit") from None
    except ValueError as error:
        raise GroupError.refusal(error) from None


# ------------------------------------------------------------------------------------------------------- coming back
def with_progress(stock: Callable) -> Callable:
    def add(self: RequestOutput, next_output: RequestOutput, aggregate: bool) -> None:
        earlier = _payload(self).get("progress")
        stock(self, next_output, aggregate)
        if earlier:
            payload = _payload(self)
            self.kv_transfer_params = {"smc": payload | {"progress": earlier + payload.get("progress", [])}}

    return add


def _payload(output: RequestOutput) -> dict[str, Any]:
    return (output.kv_transfer_params or {}).get("smc", {})


@dataclasses.dataclass
class Record:
    """Follows one group request for the route that answers it.

    Attributes:
        payload: what came with the final output: summary, and population if asked for.
        error: why there is none.
        begun: is set at the first sign of life, or death.
    """

    payload: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: GroupError | None = None
    begun: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def summary(self) -> dict[str, Any]:
        """Returns what a client gets: the payload without what else travels in it."""
        hidden = ("progress", "samples", "sample_token_ids", "sample_finish_reasons")
        return {key: value for key, value in self.payload.items() if key not in hidden}


def with_groups(stock: Callable) -> Callable:
    def generate(
        self: Any,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        smc_record: Record | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        if not is_group_request(sampling_params):
            return stock(self, prompt, sampling_params, request_id, **kwargs)
        if smc_record is None:  # at once, and not with the first output, when an answer may have begun
            raise elsewhere(sampling_params.extra_args)
        return _generate(stock, self, prompt, sampling_params, request_id, smc_record, kwargs)

    return generate


def elsewhere(keys: Iterable[str]) -> GroupError:
    """Makes the error of a route that does not know groups."""
    key = next(key for key in keys if str(key).startswith(PREFIX))
    return GroupError(400, f"{key}: this route does not answer with groups of particles; use {', '.join(ROUTES)}", key)


async def _generate(
    stock: Callable, client: Any, prompt: Any, params: SamplingParams, request_id: str, record: Record, kwargs: dict
) -> AsyncGenerator[RequestOutput, None]:
    """Runs a group request; yields outputs with as many choices as `params.n` says.

    Raises:
        GroupError: there is no population, or it is not what was streamed.
    """
    asked, choices = _engine_params(client, params), None
    start, n, outcome, n_tokens = time.monotonic(), (asked.extra_args or {}).get(GROUP_KEY), "aborted", 0
    metrics = front_end_metrics(client.vllm_config)
    metrics.started(request_id, n if isinstance(n, int) else 0)
    try:
        async for output in stock(client, prompt, asked, request_id, **kwargs):
            payload = _payload(output)
            record.begun.set()
            metrics.progress(request_id, payload.get("progress", ()))
            n_tokens = payload.get("particle_tokens", 0)
            if "error" in payload:
                raise GroupError.of_payload(payload)
            if output.finished:
                # by the operator, not because the client left, or by vLLM for want of something
                ended = {"abort": "aborted", "error": "engine"}
                outcome = ended.get(output.outputs[0].finish_reason or "", "finished")
                if outcome == "finished":  # else the last output may hold steps, and no population
                    record.payload = payload
            choices = choices or Choices(params.n, client.renderer.tokenizer, asked, output)
            choices.extend(output)
            if output.finished or params.output_kind != RequestOutputKind.FINAL_ONLY:
                yield output
    except (VLLMClientError, GracefulHTTPError) as error:  # of vLLM's own checks, too
        record.error = error if isinstance(error, GroupError) else GroupError.of_vllm(error)
        outcome = record.error.outcome
        raise record.error from None
    except Exception:  # the engine died, say; of a client that left there is none
        outcome = "engine"
        raise
    finally:
        record.begun.set()
        metrics.ended(request_id, outcome, n_tokens, None if outcome in NOT_STARTED else time.monotonic() - start)


def _engine_params(client: Any, params: SamplingParams) -> SamplingParams:
    """Returns the SamplingParams that go to the engine, where n choices are draws from one population."""
    asked = params.clone()
    asked.n = 1
    extra = dict(params.extra_args or {})
    if not EngineOptions.of(client.vllm_config.additional_config).captured_steps:  # whose groups report no steps
        extra[PREFIX + "progress"] = True
    if params.n > 1:
        extra[PREFIX + "n_samples"] = params.n
    if params.output_kind == RequestOutputKind.DELTA:
        extra[PREFIX + "stream_tokens"] = True
    else:  # with outputs before the last, which say how it goes
        asked.output_kind = RequestOutputKind.CUMULATIVE
    asked.extra_args = extra
    # as the engine will do it: with the tokens that end a particle
    asked.update_from_generation_config(
        client.input_processor.generation_config_fields, client.renderer.get_eos_token_id()
    )
    return asked


class Choices:
    """Makes n choices of a group's outputs, which have one: its text for each of the particles that were drawn.

    Each has a detokenizer of vLLM's, so their texts are what vLLM would make of these tokens, stop strings included.
    """

    def __init__(self, n: int, tokenizer: Any, params: SamplingParams, output: RequestOutput) -> None:
        request: Any = SimpleNamespace(
            request_id=output.request_id,
            sampling_params=params,
            prompt_token_ids=output.prompt_token_ids,
            prompt_embeds=None,
        )
        tokenizer = tokenizer if params.detokenize else None
        self._texts = [IncrementalDetokenizer.from_new_request(tokenizer, request) for _ in range(n)]
        self._delta = params.output_kind == RequestOutputKind.DELTA
        self._stops = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            self._stops |= params.all_stop_token_ids
        self._stop_token_ids = set(params.stop_token_ids or ())
        self._sent: list[int] = []

    def extend(self, output: RequestOutput) -> None:
        """Puts the choices in the place of the output's one.

        Raises:
            GroupError: the particles do not begin with what was sent.
        """
        first = output.outputs[0]
        if not output.finished:
            new = list(first.token_ids) if self._delta else list(first.token_ids)[len(self._sent) :]
            self._sent += new
            output.outputs = [self._choice(j, new, None) for j in range(len(self._texts))]
            return
        payload = _payload(output)
        ids, reasons = payload.get("sample_token_ids"), payload.get("sample_finish_reasons")
        if ids is None or reasons is None:
            return  # an error of the engine's, which the handler reports
        if any(tokens[: len(self._sent)] != self._sent for tokens in ids):
            raise GroupError(
                500,
                "the group was restarted, and its particles no longer begin with what was streamed",
                outcome="engine",
            )
        output.outputs = [
            self._choice(j, tokens[len(self._sent) :], reason)
            for j, tokens, reason in zip(
                range(len(self._texts)), ids, reasons, strict=False
            )  # the first n of the samples
        ]

    def _choice(self, j: int, new: list[int], finish_reason: str | None) -> CompletionOutput:
        text = self._texts[j]
        by_token = finish_reason is not None and bool(new) and new[-1] in self._stops
        stop_reason: int | str | None = text.update(new, by_token)
        if by_token and new[-1] in self._stop_token_ids:
            stop_reason = new[-1]
        return CompletionOutput(
            index=j,
            text=text.get_next_output_text(finish_reason is not None, self._delta),
            token_ids=new if self._delta else [*self._sent, *(new if finish_reason is not None else [])],
            cumulative_logprob=None,
            logprobs=None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
