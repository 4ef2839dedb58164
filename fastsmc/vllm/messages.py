"""What travels between the scheduler and the workers: a `StepOrder` to them, a `GroupResult` per group back.

Both are attributes that are added to vLLM's own objects: `SchedulerOutput.smc` and `ModelRunnerOutput.smc_results`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastsmc.params import SMCParams


@dataclasses.dataclass(frozen=True)
class FactualText:
    """Says what text a counterfactual group is asked about.

    Attributes:
        token_ids: the text.
        temperature: at which it was drawn; the other settings are the group's.
        noise: as of `Evidence`.
        facts: name under which a worker keeps what another model said of it; None: the engine's model is asked.
    """

    token_ids: list[int]
    temperature: float
    noise: str = "exact"
    facts: str | None = None

    @property
    def n_companions(self) -> int:
        """Counts the groups of one particle beside the counterfactual group (`Group.companions`)."""
        return 2 if self.facts is None else 1


@dataclasses.dataclass
class GroupStart:
    """Holds all that a worker needs to begin a group.

    Attributes:
        stop_token_ids: what ends a particle.
        all_stop_token_ids: what min_tokens rules out, vLLM's set of this name: with ignore_eos more than that.
        progress: its results say how each step went.
        stream_tokens: they hold tokens as soon as these are final.
        n_samples: how many particles are drawn by weight at its end.
        keep_logits: name under which the worker keeps the logits along the exact sample of a group of one particle.
    """

    params: SMCParams
    prompt: list[int]
    prompt_blocks: list[int]
    stop_token_ids: frozenset[int]
    all_stop_token_ids: frozenset[int]
    potential: str | None
    potential_args: str
    twist: str | None
    exact: list[list[int]] | None
    lookahead: int
    return_population: bool
    progress: bool = False
    stream_tokens: bool = False
    n_samples: int = 1
    adapter: Any = None  #: vLLM's LoRARequest; None: the model as it is
    intervention: str | None = None  #: name under which the workers keep it
    n_intervened_blocks: int = 0  #: of the blocks it gets, so many first ones are for the last columns of its prompt
    factual: FactualText | None = None
    keep_logits: str | None = None


@dataclasses.dataclass
class GroupStep:
    """Asks for a group's share of an engine step: up to `steps` particle steps, with new `blocks`.

    Attributes:
        alone: its rows share no forward pass with those of other groups.
    """

    request_id: str
    epoch: int
    steps: int
    blocks: list[int]
    start: GroupStart | None
    alone: bool = False


@dataclasses.dataclass
class StepOrder:
    """Says what the groups do in an engine step, and which groups the workers forget before it.

    The rows of all groups that are not `alone` go into one forward pass per particle step, those of each that is into a
    pass of their own. With `max_rows` the pass that would exceed it is cut: the rest of its rows is kept, and until
    they have run it is *half done*. Each of its groups answers `partial`, the next order with groups names exactly
    these, without new blocks, and runs on. Passes after the cut one are not begun; their groups answer as they stood.
    An order, with groups or without, that drops one of the half's groups undoes it: the others begin their step anew.

    Groups that the captured driver runs are alone, and take whole steps whatever `max_rows` says.

    An order whose `SchedulerOutput` schedules tokens *rides*: one pass of the groups that are not `alone`, or a part of
    it, goes into the forward pass of those tokens.

    Attributes:
        drop: request ids of groups that have ended, or were aborted or preempted.
        patience: seconds that the worker may wait for a potential to be prepared; 0 where there is other work.
        max_rows: rows that this order runs at most, in all its passes; None: all of them.
    """

    groups: list[GroupStep]
    drop: list[str]
    patience: float = 0.0
    max_rows: int | None = None


@dataclasses.dataclass
class GroupResult:
    """Says what one group's share of a step came to.

    Attributes:
        rides: whether rows can ride in ordinary steps of this worker.
        step: particle steps done so far.
        need: KV blocks without which it cannot go on; 0: none.
        surplus: KV blocks given back.
        waiting: its potential is still being prepared, or what it needs for its answers is not there; ask again.
        partial: its pass is half done; it has no need and no surplus then.
        rows, seconds: model rows that the order ran, and what the model took for them (forward pass and logits) by the
            clock; of all groups together, in the first result of an order.
        progress: of the steps since the last result, as `Group.progress` has them; empty unless asked for.
        common: tokens that have become final since the last result: whichever particle is drawn in the end has them
            after those before; empty unless asked for.
        error, error_kind: the group has failed: why, and through whom (`SMCError.kind`).
        token_ids, stopped: of one particle drawn by weight, when the group is done; token_ids is None if no particle
            has any weight. `stopped`: by a stop token; `stopped_by_potential`: by `Potential.stop` instead, or by a
            stop string beside it.
        summary: values that JSON has, for every client, empty until the group is done; `population` is the whole
            (base64 of `Population.to_bytes`, so that it passes through JSON), when asked for.
    """

    request_id: str
    epoch: int
    rides: bool = False
    step: int = 0
    done: bool = False
    need: int = 0
    surplus: list[int] = dataclasses.field(default_factory=list)
    waiting: bool = False
    partial: bool = False
    rows: int = 0
    seconds: float = 0.0
    progress: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    common: list[int] = dataclasses.field(default_factory=list)
    error: str | None = None
    error_kind: str = "engine"
    token_ids: list[int] | None = None
    stopped: bool = False
    stopped_by_potential: bool = False
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    population: str | None = None
