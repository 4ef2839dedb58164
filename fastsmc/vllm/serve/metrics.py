"""Prometheus metrics of group requests, on vLLM's own /metrics.

The front end says when a group request starts, what its steps report and how it ends; the engine is not asked. The
collectors stand in Prometheus' default registry, where vLLM has its own, and are made with the first `Metrics`: with
several API servers each process writes its own files, and the answer of any of them is the sum.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge, Histogram

LABELS = ("model_name", "engine")
#: how a group request ends: with a population, because its client went away, or with an error of one of the kinds that
#: `fastsmc.vllm.serve.errors` gives a status each
OUTCOMES = ("finished", "aborted", "refused", "limit", "impossible", "potential", "engine", "busy")
#: those of groups that no engine has started
NOT_STARTED = ("refused", "limit", "busy")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)


class _Collectors(NamedTuple):
    groups_running: Gauge
    groups_waiting: Gauge
    particles_running: Gauge
    particle_tokens: Counter
    resamplings: Counter
    groups: Counter
    ess_fraction: Histogram
    distinct_share: Histogram
    group_seconds: Histogram


@functools.cache
def _collectors() -> _Collectors:
    """Registers the collectors; once per process, since a registry takes each name once."""

    def gauge(name: str, text: str) -> Gauge:
        return Gauge(name, text, LABELS, multiprocess_mode="livesum")

    return _Collectors(
        groups_running=gauge("fastsmc:groups_running", "Groups that take steps."),
        groups_waiting=gauge("fastsmc:groups_waiting", "Groups that have not taken a step yet."),
        particles_running=gauge("fastsmc:particles_running", "Particles of the groups that take steps."),
        particle_tokens=Counter(
            "fastsmc:particle_tokens", "Tokens of all particles, counted when their group ends.", LABELS
        ),
        resamplings=Counter("fastsmc:resamplings", "Steps at which a group was resampled.", LABELS),
        groups=Counter("fastsmc:groups", "Groups that ended, by outcome.", (*LABELS, "outcome")),
        ess_fraction=Histogram(
            "fastsmc:ess_fraction", "Effective sample size of a step over N.", LABELS, buckets=SHARES
        ),
        distinct_share=Histogram(
            "fastsmc:distinct_share", "Distinct histories that go on after a step over N.", LABELS, buckets=SHARES
        ),
        group_seconds=Histogram(
            "fastsmc:group_seconds", "Seconds from a group's arrival to its end, if it was started.", LABELS,
            buckets=SECONDS,
        ),
    )  # fmt: skip


@functools.cache
def metrics_of(model_name: str, engine: str) -> Metrics:
    """Finds the counts of a model and an engine, which all routes share."""
    return Metrics(model_name, engine)


def front_end_metrics(config: Any) -> Metrics:
    """Finds the counts that a front end of this `VllmConfig` keeps, made with the first call."""
    parallel = config.parallel_config
    local = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    engines = parallel.data_parallel_size_local if local else parallel.data_parallel_size
    rank = parallel.data_parallel_rank if local else 0
    return metrics_of(config.model_config.served_model_name, str(rank) if engines == 1 else "")


class Metrics:
    """Counts the group requests of one front end. Its methods may be called from any thread.

    Args:
        model_name: as vLLM labels its own metrics.
        engine: the index of the engine that the front end speaks to; "" (as good as no label) if there are several,
            since the front end does not know which of them has a group.
    """

    def __init__(self, model_name: str, engine: str = "0") -> None:
        collectors = _collectors()
        labels = (model_name, engine)
        self._groups = {outcome: collectors.groups.labels(*labels, outcome) for outcome in OUTCOMES}
        self._groups_running = collectors.groups_running.labels(*labels)
        self._groups_waiting = collectors.groups_waiting.labels(*labels)
        self._particles_running = collectors.particles_running.labels(*labels)
        self._particle_tokens = collectors.particle_tokens.labels(*labels)
        self._resamplings = collectors.resamplings.labels(*labels)
        self._ess_fraction = collectors.ess_fraction.labels(*labels)
        self._distinct_share = collectors.distinct_share.labels(*labels)
        self._group_seconds = collectors.group_seconds.labels(*labels)
        self._lock = threading.Lock()
        self._waiting: dict[str, int] = {}  # N by request
        self._running: dict[str, int] = {}

    def started(self, request_id: str, n: int) -> None:
        """Notes that a group of n particles has been handed to the engine, where it waits."""
        with self._lock:
            self._running.pop(request_id, None)
            self._waiting[request_id] = n
            self._show()

    def progress(self, request_id: str, progress: Iterable[Mapping[str, Any]]) -> None:
        """Notes what the steps since the last call report. The group runs from now on; unknown requests pass."""
        with self._lock:
            n = self._waiting.pop(request_id, None)
            if n is not None:
                self._running[request_id] = n
                self._show()
            n = self._running.get(request_id)
        if n is None:
            return
        for step in progress:
            if step.get("resampled"):
                self._resamplings.inc()
            for name, histogram in (("ess", self._ess_fraction), ("distinct", self._distinct_share)):
                if step.get(name):  # 0: no particle has weight, or none goes on
                    histogram.observe(step[name] / n)

    def ended(self, request_id: str, outcome: str, n_tokens: int = 0, seconds: float | None = None) -> None:
        """Notes that a group request has ended, or was answered without having been started.

        Args:
            outcome: one of `OUTCOMES`.
            n_tokens: tokens of all its particles, as far as is known.
            seconds: since it arrived; None if it was not started.

        Raises:
            ValueError: the outcome is not among them.
        """
        if outcome not in self._groups:
            raise ValueError(f"outcome={outcome!r}: must be one of {', '.join(map(repr, OUTCOMES))}")
        with self._lock:
            self._waiting.pop(request_id, None)
            self._running.pop(request_id, None)
            self._show()
        self._groups[outcome].inc()
        self._particle_tokens.inc(n_tokens)
        if seconds is not None:
            self._group_seconds.observe(seconds)

    def _show(self) -> None:
        self._groups_waiting.set(len(self._waiting))
        self._groups_running.set(len(self._running))
        self._particles_running.set(sum(self._running.values()))
