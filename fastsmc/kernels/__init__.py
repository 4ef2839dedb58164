"""fastsmc.kernels, in a source tree and an editable install: its files lie in kernels/, beside the package.

A wheel has those files here and not this one (pyproject.toml: package-dir).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__path__ = [str(Path(__file__).parents[2] / "kernels")]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...  # the modules, which a type checker does not find by __path__
