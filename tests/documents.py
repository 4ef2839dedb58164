"""The Markdown of the tree, as tests read it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(document, language):
    """Fenced code blocks of a document, by its path in the tree, in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
