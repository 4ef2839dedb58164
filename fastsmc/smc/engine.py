"""What a potential is set up with, and the error that a group ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from fastsmc.population import Population
from fastsmc.potentials import Engine, Potential
from fastsmc.potentials.copying import own_copy


class SMCError(RuntimeError):
    """A group could not go on, or was refused. Other groups and requests are not touched by it.

    Args:
        kind: through whom: "refused" (what was asked cannot be), "potential" (a user's code) or "engine".

    Attributes:
        populations: of a call of `smc`: what each prompt gave, None for the groups that failed; else empty.
        errors: of a call with several prompts: of each the error that it ended with, None for those that did not.
    """

    populations: Sequence[Population | None] = ()
    errors: Sequence[SMCError | None] = ()

    def __init__(self, *args: object, kind: str = "potential") -> None:
        super().__init__(*args)
        self.kind = kind


def gather(outcomes: Sequence[Population | SMCError], single: bool) -> list[Population]:
    """Returns what the prompts of a call of `smc` gave.

    Raises:
        SMCError: some have failed; it holds what the others gave. Of a `single` prompt it is the prompt's.
    """
    failures = [(i, one) for i, one in enumerate(outcomes) if isinstance(one, SMCError)]
    if not failures:
        return [one for one in outcomes if isinstance(one, Population)]
    first = failures[0][1]
    if single:
        first.populations = [None]
        raise first
    error = SMCError("; ".join(f"prompt {i}: {failure}" for i, failure in failures), kind=failures[-1][1].kind)
    error.populations = [None if isinstance(one, SMCError) else one for one in outcomes]
    error.errors = [one if isinstance(one, SMCError) else None for one in outcomes]
    raise error from first


class GroupEngine(Engine):
    """The worker's engine as potentials see it; `continuation_log_prob` answers for the group whose potential asks.

    The arguments are the attributes of `Engine`.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        device: torch.device | str = "cpu",
        vocab_size: int = 0,
        hidden_size: int | None = None,
        model: Any = None,
        model_name: str | None = None,
    ) -> None:
        self.tokenizer, self.device, self.model, self.model_name = tokenizer, torch.device(device), model, model_name
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.scorer: Callable[[list[int], int], Tensor] | None = None  # while a potential is asked for scores

    def continuation_log_prob(self, token_ids: list[int], given: int = 0) -> Tensor:
        if self.scorer is None:
            raise RuntimeError("continuation_log_prob: only from within prefix or complete")
        return self.scorer(token_ids, given)


def set_up(potential: Potential, engine: GroupEngine) -> Potential:
    """Sets a potential up and returns what its groups start from: a copy, out of reach of whoever holds the object.

    Raises:
        SMCError: its `setup` raised, or left what no group can have a copy of.
    """
    try:
        potential.setup(engine)
        return own_copy(potential, engine)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise SMCError(f"potential {type(potential).__name__}.setup: raised {type(error).__name__}: {error}") from error


def pickled(potential: Potential | None, by_value: bool) -> bytes:
    """Pickles a potential for another process; `by_value` with the module of its class, which it may lack.

    Raises:
        SMCError: it cannot be pickled.
    """
    module = sys.modules.get(type(potential).__module__)
    try:
        if by_value and module is not None:
            cloudpickle.register_pickle_by_value(module)
        return cloudpickle.dumps(potential)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise SMCError(f"potential {type(potential).__name__} cannot be sent to the worker: {error}") from error
    finally:
        if by_value and module is not None:
            cloudpickle.unregister_pickle_by_value(module)
