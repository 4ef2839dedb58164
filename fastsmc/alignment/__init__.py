"""Causal abstraction: which variable of a causal model a representation plays.

CausalModel → pairs → train_alignment (BoundlessDAS over a frozen trunk) → a basis, for IIA and interventions
"""

from fastsmc.alignment.causal import CausalModel, Pairs, answer_ids, pairs
from fastsmc.alignment.das import BoundlessDAS
from fastsmc.alignment.iia import HeatMap, heat_map, iia
from fastsmc.alignment.train import frozen_iia, train_alignment

__all__ = [
    "BoundlessDAS", "CausalModel", "HeatMap", "Pairs", "answer_ids", "frozen_iia", "heat_map", "iia", "pairs",
    "train_alignment",
]  # fmt: skip
