"""fastsmc: Sequential Monte Carlo with language models, inside vLLM. See README.md.

`LLM` is loaded at first use, so that the core (params, potentials, population, ops, group) imports without vLLM.
"""

from typing import TYPE_CHECKING, Any

from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Masked, Potential, Rows

if TYPE_CHECKING:
    from fastsmc.smc import SMCError
    from fastsmc.vllm.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "Masked", "Population", "Potential", "Rows", "SMCError", "SMCParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from fastsmc.vllm import compat

        compat.check_version()
        compat.check_media()  # before anything imports vLLM
        from fastsmc.vllm.llm import LLM

        return LLM
    if name == "SMCError":
        from fastsmc.smc import SMCError

        return SMCError
    raise AttributeError(f"module 'fastsmc' has no attribute {name!r}")
