"""`PoolingReward`: scores of a reward model behind HTTP, a vLLM server with `--runner pooling`.

    texts → batches → POST, again after a pause where the server was not able to → probabilities of labels → scores

The operator names the server; nothing of a request reaches its address or its credentials.
"""

from __future__ import annotations

import ipaddress
import json
import os
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastsmc.potentials.base import Engine
from fastsmc.potentials.reward import NetworkReward
from fastsmc.potentials.tokens import short
from fastsmc.values import check_float, check_int

#: what the two routes answer about each text: probabilities of labels, or a row of them per token (or per step)
ROUTES = ("/classify", "/pooling")
#: seconds before the second attempt; each further pause is twice as long, and none longer than the second number
PAUSES = (0.25, 8.0)
#: bytes of an answer that are read
MOST_BYTES = 1 << 28


class PoolingReward(NetworkReward):
    """Scores with a reward model that a vLLM server with `--runner pooling` holds.

    Asking takes a while: the group is parked meanwhile, and others go on. A server that cannot be reached, answers with
    HTTP 429 or 5xx, or drops the connection, is asked again; one that takes longer than `timeout` is not. What fails
    ends the group, with the URL and the seconds. A group that is aborted asks no more.

    Args:
        url: of the server's /classify, for a sequence classifier (`probs` of each text), or its /pooling, for a process
            reward model (`data` of each text, whose last row is that of the last step).
        model: name of the model; None: that of the server.
        timeout: seconds that one attempt may take.
        retries: attempts after the first.
        batch_size: texts per request.
        api_key_env: name of an environment variable of the worker that holds the bearer token; None: there is none.
        template, step, step_token, step_join, label, aggregate, scale: as of `NetworkReward`.

    Raises:
        ValueError: naming the argument; in `setup`: the environment variable is not set.
    """

    shared_by_groups = ("_client",)
    in_background = True
    by_request = False  # who names the server also sees its answers, and may reach what only this machine reaches

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        batch_size: int = 256,
        api_key_env: str | None = None,
        **reading: Any,
    ) -> None:
        super().__init__(**reading)
        self.url = _check_url(url)
        for name, value in (("model", model), ("api_key_env", api_key_env)):
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"{name}={value!r}: must be text, or None")
        self.model, self.api_key_env = model, api_key_env
        self.timeout = check_float("timeout", timeout, 0.001, 86400.0)
        self.retries = check_int("retries", retries, 0, 100)
        self.batch_size = check_int("batch_size", batch_size, 1)

    def setup(self, engine: Engine) -> None:
        import httpx  # comes with vLLM

        super().setup(engine)
        headers = {}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise ValueError(f"PoolingReward: api_key_env={self.api_key_env!r}: is not set in this process")
            headers["Authorization"] = f"Bearer {key}"
        # a proxy of the environment's knows nothing of this machine's own servers
        self._client = httpx.Client(
            headers=headers,
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=None),  # one per group that waits
            trust_env=not _is_local(self.url),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_client"}  # which setup makes

    def source(self) -> str:
        return f"PoolingReward: {self.url}"

    def score(self, texts: list[str]) -> list[float]:
        return self.score_until(texts, lambda: False)

    def score_until(self, texts: list[str], cancelled: Callable[[], bool]) -> list[float]:
        read, scores = self.reads(texts), []
        for begin in range(0, len(read), self.batch_size):
            batch = read[begin : begin + self.batch_size]
            scores += self._read(self._ask(batch, cancelled), len(batch))
        return scores

    def _ask(self, batch: list[str], cancelled: Callable[[], bool]) -> bytes:
        """Posts a batch until it is answered: the answer's body.

        Raises:
            RuntimeError: it is not, or the group was aborted.
        """
        import httpx

        body: dict[str, Any] = {"input": batch} if self.model is None else {"input": batch, "model": self.model}
        begun, pause = time.monotonic(), PAUSES[0]
        for attempt in range(1, self.retries + 2):
            if cancelled():
                raise RuntimeError(self._failure("was asked by a group that was aborted", begun, attempt - 1))
            try:
                status, answer = self._post(body)
            except (httpx.TimeoutException, TimeoutError):
                what = f"gave no answer within timeout={self.timeout:g} s"
                raise RuntimeError(self._failure(what, begun, attempt)) from None
            except httpx.TransportError as error:
                what = f"cannot be reached: {error or type(error).__name__}"
            except httpx.HTTPError as error:
                raise RuntimeError(self._failure(f"gave no answer: {error}", begun, attempt)) from None
            else:
                if status == 200:
                    return answer
                what = f"answered HTTP {status}: {short(answer[:200].decode(errors='replace'))}"
                if status != 429 and status < 500:
                    break
            if attempt <= self.retries:
                _sleep(pause, cancelled)
                pause = min(2 * pause, PAUSES[1])
        raise RuntimeError(self._failure(what, begun, attempt))

    def _post(self, body: dict[str, Any]) -> tuple[int, bytes]:
        """Sends a request: status and body of the answer, which may come in parts but not for longer than `timeout`."""
        until, parts, size = time.monotonic() + self.timeout, [], 0
        with self._client.stream("POST", self.url, json=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > until:
                    raise TimeoutError
                if size > MOST_BYTES:
                    raise ValueError(f"PoolingReward: {self.url} answered with more than {MOST_BYTES} bytes")
        return response.status_code, b"".join(parts)

    def _failure(self, what: str, begun: float, attempts: int) -> str:
        seconds = time.monotonic() - begun
        return f"PoolingReward: {self.url} {what} ({attempts} of {self.retries + 1} attempts, {seconds:.2f} s)"

    def _read(self, answer: bytes, n: int) -> list[float]:
        """Reads the scores of n texts from a server's answer."""
        try:
            data = sorted(json.loads(answer)["data"], key=lambda item: item["index"])
            indices = [item["index"] for item in data]
            if self.url.endswith("/classify"):
                rows = [item["probs"] for item in data]
            else:
                if not all(item["data"] for item in data):
                    raise ValueError(f"no row for a text: is step_token={self.step_token!r} the server's step_tag_id?")
                rows = [item["data"][-1] for item in data]
                rows = [row if isinstance(row, list) else [row] for row in rows]  # of a single label it may be a number
            if indices == list(range(n)):
                return [row[self.choose(len(row))] for row in rows]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            told = short(answer[:200].decode(errors="replace"))
            raise ValueError(f"PoolingReward: {self.url} answered {told}: {type(error).__name__}: {error}") from None
        raise ValueError(f"PoolingReward: {self.url} answered about {len(indices)} texts, was asked about {n}")


def _check_url(url: Any) -> str:
    """Reads the URL of one of the `ROUTES`."""
    allowed = "must be http(s)://host…/classify or …/pooling, without credentials, a query or a fragment"
    if not isinstance(url, str):
        raise ValueError(f"url={url!r}: {allowed}")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(f"url={url!r}: {allowed}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"url: {allowed}; a key comes from api_key_env")  # not shown
    good = parts.scheme in ("http", "https") and parts.hostname and parts.path.endswith(ROUTES)
    if not good or parts.query or parts.fragment:
        raise ValueError(f"url={url!r}: {allowed}")
    return url


def _is_local(url: str) -> bool:
    """Says whether a URL is of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _sleep(seconds: float, cancelled: Callable[[], bool]) -> None:
    """Waits, but not where nobody wants the answer any more."""
    until = time.monotonic() + seconds
    while not cancelled() and time.monotonic() < until:
        time.sleep(min(0.05, seconds))
