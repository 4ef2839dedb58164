"""fastsmc.kernels, in a source tree and an editable install: its files lie in kernels/, beside the package.

A wheel has those files here and not this one (pyproject.toml: package-dir).
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
