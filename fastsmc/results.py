"""What many prompts gave, as a directory of Parquet files: `fastsmc run --input … --output DIRECTORY`; needs pyarrow.

    DIRECTORY/part-00000042.parquet      rows of `columns`, the first of which is prompt 42's

A part is there whole or not at all, and says what its populations hang on, so that a run that was cut short goes on
where it was. Any reader of Parquet takes the directory for one table.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsmc.batches import Outcome
from fastsmc.population import Population
from fastsmc.potentials.tokens import short
from fastsmc.smc.engine import SMCError

#: rows of a part, and seconds after which it is written with fewer
ROWS, SECONDS = 64, 60.0
#: where a part says what its populations hang on
KEY = b"fastsmc"


def columns(index: int, prompt: Any, population: Population) -> dict[str, Any]:
    """Makes a row of what a prompt gave; `population` is `Population.to_bytes`."""
    return {
        "index": index,
        "prompt": prompt,
        "log_z": population.log_z,
        "log_z_stderr": population.log_z_stderr,
        "final_ess": population.final_ess,
        "texts": population.texts,
        "token_ids": population.token_ids,
        "log_weights": population.log_weights.tolist(),
        "population": population.to_bytes(),
    }


def make_schema(prompts: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    """Makes the pyarrow schema of `columns`. ValueError: some prompts are texts, and others token ids."""
    import pyarrow

    kinds = {isinstance(prompt, str) for prompt in prompts}
    if len(kinds) > 1:
        raise ValueError("prompts: must be all texts, or all lists of token ids, to be a column of a table")
    types = {
        "index": pyarrow.int64(),
        "prompt": pyarrow.string() if True in kinds else pyarrow.list_(pyarrow.int64()),
        "log_z": pyarrow.float64(),
        "log_z_stderr": pyarrow.float64(),
        "final_ess": pyarrow.float64(),
        "texts": pyarrow.list_(pyarrow.string()),
        "token_ids": pyarrow.list_(pyarrow.list_(pyarrow.int64())),
        "log_weights": pyarrow.list_(pyarrow.float64()),
        "population": pyarrow.large_binary(),
    }
    return pyarrow.schema([*types.items()], metadata={KEY: json.dumps(settings)})


class Results:
    """Is a directory of results of one job.

    Args:
        path: made if it is not there.
        prompts: of the job, texts or lists of token ids.
        settings: what populations hang on beside their prompts, in JSON values.

    Attributes:
        finished: indices of the prompts whose results are there.

    Raises:
        ValueError: the directory holds results of other settings or prompts, or what is no part.
        ImportError: there is no pyarrow.
    """

    def __init__(self, path: str | os.PathLike, prompts: Sequence[Any], settings: Mapping[str, Any]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError(f'Parquet files need pyarrow ({error}); pip install "fastsmc[ray]"') from None
        self.path, self._prompts = Path(path), prompts
        self._settings = json.loads(json.dumps(dict(settings)))
        self._schema, self._rows = make_schema(prompts, self._settings), list[dict[str, Any]]()
        self._since = time.monotonic()
        self.finished: set[int] = set()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output={str(path)!r}: is a file; must be a directory, which may not be there yet")
        self.path.mkdir(parents=True, exist_ok=True)
        for part in sorted(self.path.iterdir()):
            if part.suffix == ".unfinished":
                part.unlink()
                continue
            try:
                file = parquet.ParquetFile(part)
                found = json.loads((file.schema_arrow.metadata or {})[KEY])
                rows = file.read(["index", "prompt"]).to_pylist()
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"output: {part} is no part of results of fastsmc: {error}") from None
            self._check(part, found, rows)
            self.finished |= {row["index"] for row in rows}

    def _check(self, part: Path, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuses a part of another job."""
        for name in sorted(self._settings.keys() | found.keys()):
            if found.get(name) != self._settings.get(name):
                theirs, own = (short(values.get(name)) for values in (found, self._settings))
                raise ValueError(f"output: {part} was made with {name}={theirs}, this run has {own}; take another one")
        for row in rows:
            i = row["index"]
            if i >= len(self._prompts) or row["prompt"] != self._prompts[i]:
                raise ValueError(
                    f"output: {part} has prompt {i} as {short(row['prompt'])}; this input has another there"
                )

    def take(self, outcomes: Iterator[tuple[int, Outcome]]) -> Iterator[tuple[int, SMCError]]:
        """Writes the populations that come, part by part, and yields the failures; what has come is kept in any case.

        Args:
            outcomes: (index of the prompt, what became of it).
        """
        try:
            for i, outcome in outcomes:
                if isinstance(outcome, SMCError):
                    yield i, outcome
                    continue
                self._rows.append(columns(i, self._prompts[i], outcome))
                if len(self._rows) >= ROWS or time.monotonic() > self._since + SECONDS:
                    self._write()
        finally:
            self._write()

    def _write(self) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        rows, self._rows, self._since = self._rows, [], time.monotonic()
        if not rows:
            return
        table = pyarrow.Table.from_pylist(rows, schema=self._schema)
        part = self.path / f"part-{rows[0]['index']:08}.parquet"
        parquet.write_table(table, part.with_suffix(".unfinished"))
        os.replace(part.with_suffix(".unfinished"), part)
        self.finished |= {row["index"] for row in rows}
