"""Interventions: what a model does otherwise than it was trained to, as frozen values that can be kept and sent.

    Steer        x + scale·vector                    Subspace     at one position, a source's part in a subspace
    Affine       A x + b                             RankOne      W + u vᵀ, W the weight of down_proj
    Project      x without its part in a subspace,   Prompt       another prompt
                 or with a given one there           Temperature  another temperature
    Interchange  at one position, a source's x       Facts        another model's logits along a text

x is the hidden state that a layer puts out (the residual stream). A list of interventions is one, made in its order;
`fastsmc.maps` makes of it what `ops.intervene` runs. Helpers fit some of them: `Steer.from_contrast`, `Affine.mimic`,
`RankOne.edit`.

Positions count from 0 over prompt and generated tokens. A token that is generated at position p goes through the model
there, so "generated" changes logits from the second generated token on; the first one's are the prompt's.
"""

from fastsmc.interventions.base import BLOCK, DOWN_PROJ, Intervention, LayerIntervention, Sizes, Step, check_orthonormal
from fastsmc.interventions.calls import KINDS, Reading, read_interventions, take_apart
from fastsmc.interventions.files import from_bytes, load, save, to_bytes
from fastsmc.interventions.layers import Affine, Project, RankOne, Steer
from fastsmc.interventions.requests import Facts, Prompt, Temperature, check_facts_size
from fastsmc.interventions.swaps import Interchange, Subspace, Swap, read_position

__all__ = [
    "BLOCK",
    "DOWN_PROJ",
    "KINDS",
    "Affine",
    "Facts",
    "Interchange",
    "Intervention",
    "LayerIntervention",
    "Project",
    "Prompt",
    "RankOne",
    "Reading",
    "Sizes",
    "Steer",
    "Step",
    "Subspace",
    "Swap",
    "Temperature",
    "check_facts_size",
    "check_orthonormal",
    "from_bytes",
    "load",
    "read_interventions",
    "read_position",
    "save",
    "take_apart",
    "to_bytes",
]
