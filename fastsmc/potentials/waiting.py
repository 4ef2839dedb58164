"""Answers that take a while: futures of what a potential finds in the background, while its group is parked.

Such a future holds no value: the potential keeps what it found. It stays pending while its function runs, so that it
can be cancelled at any time; the function sees that as `future.cancelled()`, and what it finds then is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future


def in_background(function: Callable[[Future[None]], None]) -> Future[None]:
    """Runs function(future) in a thread; the future is done when it has returned, or holds what it raised."""
    future: Future[None] = Future()

    def run() -> None:
        error: BaseException | None = None
        try:
            function(future)
        except BaseException as raised:
            error = raised
        _settle(future, error)

    # a daemon: an engine that is shut down does not wait for what nobody will use
    threading.Thread(target=run, name="fastsmc-background", daemon=True).start()
    return future


def join(futures: Sequence[Future[None] | None]) -> Future[None] | None:
    """Makes a future that is done when all are, those that are not None; None: there are none.

    It holds the first exception that one of them holds, in their order, and is cancelled where one is. Cancelling it
    cancels all of them.
    """
    waited = [future for future in futures if future is not None]
    if len(waited) < 2:
        return waited[0] if waited else None
    joined: Future[None] = Future()
    lock = threading.Lock()  # the last two may be done at once
    ended: list[bool] = []

    def cancel_all(_: Future[None]) -> None:
        if joined.cancelled():
            for future in waited:
                future.cancel()

    def end(_: Future[None]) -> None:
        with lock:
            if ended or not all(future.done() for future in waited):
                return
            ended.append(True)
        if any(future.cancelled() for future in waited):
            joined.cancel()
            _settle(joined, None)
        else:
            _settle(joined, next(filter(None, (future.exception() for future in waited)), None))

    joined.add_done_callback(cancel_all)
    for future in waited:
        future.add_done_callback(end)
    return joined


def _settle(future: Future[None], error: BaseException | None) -> None:
    """Ends a future, or tells those who wait for it that it has been cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
