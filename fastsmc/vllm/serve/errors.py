"""What a client gets when there is no population: one kind of error, with an HTTP status, in vLLM's form.

400   the request is wrong, or asks for more than this engine can ever run
413   it asks for more than the operator allows
422   the target is impossible: log Ẑ = -inf; the population's summary stands beside the error
500   a potential or the engine failed
503   too many groups are waiting; with Retry-After
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.exceptions import GracefulHTTPError

from fastsmc.params import PREFIX
from fastsmc.vllm.request import COUNTERFACTUAL

#: HTTP status by what the scheduler calls the error, which is the outcome in the metrics, too
STATUS = {"refused": 400, "limit": 413, "impossible": 422, "potential": 500, "engine": 500, "busy": 503}
#: seconds after which a client may ask again
RETRY_AFTER = 1
#: how our errors begin: argument=value, or argument: what
_ARGUMENT = re.compile(r"(?:extra_args\[')?([A-Za-z_]\w*)[\w'.\[\]]*(?:=|: )")


class GroupError(GracefulHTTPError):
    """Says why a group request has no population; vLLM lets it through from its engine client to the client.

    Attributes:
        param: the argument that is to blame.
        summary: of the population, where there is one.
        outcome: as the metrics count it (`fastsmc.vllm.serve.metrics.OUTCOMES`).
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        summary: Mapping[str, Any] | None = None,
        outcome: str = "refused",
    ) -> None:
        super().__init__(message, HTTPStatus(status))
        self.param, self.summary, self.outcome = param, summary, outcome

    @classmethod
    def refusal(cls, error: ValueError) -> GroupError:
        """Makes the error of what one of our checks refused, whose message begins with the argument's name."""
        message = _in_keys(str(error))
        return cls(400, message, _blamed(message))

    @classmethod
    def of_vllm(cls, error: Exception) -> GroupError:
        """Makes the error of what vLLM itself refused, with the status and the argument that it says."""
        info = create_error_response(error).error
        outcome = "busy" if info.code == HTTPStatus.SERVICE_UNAVAILABLE else "refused"
        return cls(info.code, info.message, info.param, outcome=outcome)

    @classmethod
    def of_payload(cls, payload: Mapping[str, Any]) -> GroupError:
        """Makes the error of a group that ended with one (`{"error": text, "error_kind": kind}`)."""
        kind, message = payload.get("error_kind", "engine"), _in_keys(payload["error"])
        param = _blamed(message) if kind in ("refused", "limit") else None
        hidden = ("error", "error_kind", "population", "progress")
        summary = {key: value for key, value in payload.items() if key not in hidden}
        return cls(STATUS[kind], message, param, summary if kind == "impossible" else None, kind)

    def body(self) -> dict[str, Any]:
        """Returns vLLM's form of an error, with the summary as `smc` where there is one."""
        info = ErrorInfo(
            message=sanitize_message(self.message.encode(errors="backslashreplace").decode()),  # lone surrogates
            type=self.http_status.phrase,
            param=self.param,
            code=self.http_status.value,
        )
        return ErrorResponse(error=info).model_dump() | ({} if self.summary is None else {"smc": dict(self.summary)})

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER)} if self.http_status == HTTPStatus.SERVICE_UNAVAILABLE else None
        return JSONResponse(self.body(), status_code=self.http_status.value, headers=headers)


def _in_keys(message: str) -> str:
    """Puts the key in the place of the argument that calls in Python know by another name."""
    return f"{COUNTERFACTUAL}: {message.removeprefix('text: ')}" if message.startswith("text: ") else message


def _blamed(message: str) -> str | None:
    """Reads from what was refused the key that is to blame: of a potential, its arguments."""
    if message.startswith("potential "):
        return PREFIX + "potential_args"
    match = _ARGUMENT.match(message)
    return match and match[1]


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Is the exception handler of a FastAPI app for `GroupError`."""
    assert isinstance(error, GroupError)
    return error.response()


def with_own_names(error: GroupError, fields: Iterable[str]) -> GroupError:
    """Names the fields of the body of /v1/smc as they are called there, not as the keys in which they travel."""
    keys = rf"\b{PREFIX}(?=(?:{'|'.join(fields)})\b)"
    error.message = re.sub(keys, "", error.message)
    error.param = error.param and re.sub(keys, "", error.param)
    return error
