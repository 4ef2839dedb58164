"""Sequential Monte Carlo with particles of many groups side by side; knows tensors and ops, no model and no engine."""

from fastsmc.smc.cohort import Cohort, Scores, Wants, arrange, finish
from fastsmc.smc.engine import GroupEngine, SMCError, gather, set_up
from fastsmc.smc.group import Group

__all__ = ["Cohort", "Group", "GroupEngine", "SMCError", "Scores", "Wants", "arrange", "finish", "gather", "set_up"]
