"""genlm-control's programs over a fastsmc engine; needs `pip install "fastsmc[genlm]"`.

    FastsmcLM(llm)    an AsyncLM of genlm-backend, for PromptedLLM and all that is built on it
    install()         has genlm make one where a program asks for backend="vllm"
    smc(sampler, …)   a program as one group request
    as_potential(p)   a potential of genlm-control, for `LLM.smc`
    to_genlm(p, llm)  a potential of fastsmc, for genlm-control

Nothing else in fastsmc imports genlm. What genlm's import would change in this process is contained
(`fastsmc.genlm.containment`), so this package may be imported before it or after it.
"""

from fastsmc.genlm.containment import contain

contain()

from fastsmc.genlm.lm import FastsmcLM, install  # noqa: E402  genlm's import is contained by now
from fastsmc.genlm.potentials import as_potential, to_genlm  # noqa: E402
from fastsmc.genlm.program import asmc, smc  # noqa: E402

__all__ = ["FastsmcLM", "as_potential", "asmc", "install", "smc", "to_genlm"]
