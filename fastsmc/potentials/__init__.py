"""Potentials: what the particles are weighed with.

The vocabulary is genlm-control's: `prefix` scores an unfinished sequence, `complete` a finished one, `logw_next` every
next token at once. A potential sees all N particles of a group in one call, as tensors on the worker's device.

    base       the contract: Potential, State, Engine, Rows, Masked
    answers    what `logw_next` answered, checked, as the ops take it
    registry   potentials by name, as commands and HTTP clients give them
    waiting    answers that come later, for `Potential.fetch`
    one file per potential: lexicon, regex (with automaton), grammar (with matchers, ebnf), infill, judge, text,
               condition, product; reward, with what scores: hf_reward, pooling_reward
"""

from fastsmc.potentials.base import Engine, Masked, Potential, Rows, State, answered
from fastsmc.potentials.condition import Condition
from fastsmc.potentials.grammar import Choice, Grammar, JsonSchema
from fastsmc.potentials.hf_reward import HFReward
from fastsmc.potentials.infill import Infill
from fastsmc.potentials.judge import Judge
from fastsmc.potentials.lexicon import Lexicon
from fastsmc.potentials.pooling_reward import PoolingReward
from fastsmc.potentials.product import Final, Product
from fastsmc.potentials.regex import Regex
from fastsmc.potentials.registry import GROUP, registered, resolve
from fastsmc.potentials.reward import RewardModel
from fastsmc.potentials.text import TextPotential
from fastsmc.potentials.tokens import token_bytes, token_list

__all__ = [
    "GROUP", "Choice", "Condition", "Engine", "Final", "Grammar", "HFReward", "Infill", "JsonSchema", "Judge",
    "Lexicon", "Masked", "PoolingReward", "Potential", "Product", "Regex", "RewardModel", "Rows", "State",
    "TextPotential", "answered", "registered", "resolve", "token_bytes", "token_list",
]  # fmt: skip
