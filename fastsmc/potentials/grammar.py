"""`Grammar`, `JsonSchema`, `Choice`: the generated text is a sentence of a grammar, JSON of a schema, one of several.

EBNF, Lark, JSON Schema → llguidance (`fastsmc.potentials.matchers`) → packed masks
a list of texts         → `Regex`
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from llguidance import LLMatcher
from torch import Tensor

from fastsmc.potentials import ebnf
from fastsmc.potentials.base import Engine, Masked, Potential, State
from fastsmc.potentials.matchers import NOWHERE, START, Matchers, check, on_a_small_stack, vocabulary_of
from fastsmc.potentials.regex import Regex
from fastsmc.potentials.tokens import log_of, short, token_bytes, tokenizer_of
from fastsmc.values import check_choice

#: characters of a schema; and of a grammar, or of all choices, which an engine's loop reads for those who name them
MAX_CHARACTERS, MAX_GRAMMAR = 1 << 20, 1 << 17
#: behind a grammar, where it wins: llguidance would allow a single tokenization of what is forced
_ALL_TOKENS = '\n%llguidance {"no_forcing": true}\n'
#: how llguidance's reason begins where a schema is to blame
_OF_JSON = "at 1(8): failed to compile JSON schema: "
#: how JSON is written, as llguidance's options
WHITESPACE: Mapping[str, Mapping[str, Any]] = {
    "compact": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
    "flexible": {"whitespace_flexible": True},
}


class Grammar(Potential):
    """φ = 1 if the generated text, without the stop token, is a sentence of a grammar, else 0.

    ψ is 1 as long as the text begins as a sentence does (as far as llguidance can tell), by any tokens: Ẑ estimates the
    probability that p0 writes a sentence within `max_tokens`, over all its tokenizations. Stop tokens are allowed after
    a sentence, and no longer than that is a text its own end: a particle that is in the middle of a sentence at
    `max_tokens` gets φ = 0. The text is the bytes of the tokens in a row; special tokens other than stop tokens are
    never part of it.

    Two languages are read. EBNF has rules `NAME ::= …`, of which `root` is the first, with `"text"`, `[a-z]`, `[^a-z]`,
    `.`, `( )`, `|`, `*`, `+`, `?`, `{m,n}` and comments behind `#`: what llama.cpp, xgrammar and vLLM read. Its
    sentences are those of the context-free grammar. Everything else is Lark in llguidance's dialect, with the rule
    `start`; there a terminal takes as much of the text as it can, as in Lark.

    Args:
        grammar: the grammar's text.

    Raises:
        ValueError: the grammar is no text, or no EBNF; in `prepare`: llguidance does not support it, or takes too long.
    """

    shared_by_groups = ("_matchers",)
    per_particle = ("_at",)

    def __init__(self, grammar: str) -> None:
        _check_text("grammar", grammar, MAX_GRAMMAR)
        self.grammar = grammar
        lark = grammar
        if "::=" in grammar:
            try:
                lark = ebnf.to_lark(grammar)
            except ValueError as error:
                raise ValueError(f"grammar={short(grammar)}: {error}") from None
        self._take(lark, f"grammar={short(grammar)}")

    def _take(self, lark: str, what: str) -> None:
        """Takes a grammar in Lark; `what` is what its user gave. llguidance sees it in `prepare`."""
        self._lark, self._what = lark + _ALL_TOKENS, what
        self._matchers: Any = None

    def prepare(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError(f"{type(self).__name__}: this engine has no tokenizer")
        on_a_small_stack(functools.partial(self._check, tokenizer))

    def _check(self, tokenizer: Any) -> None:
        tokens = token_bytes(tokenizer)
        try:
            check(vocabulary_of(tokenizer, tokens, len(tokens)), self._lark)
        except ValueError as error:
            raise self._refused(str(error)) from None

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {self._what}: {_shortened(reason)[:1000]}")

    def setup(self, engine: Engine) -> None:
        tokenizer = tokenizer_of(engine, type(self).__name__)
        tokens = token_bytes(tokenizer)
        vocabulary = vocabulary_of(tokenizer, tokens, engine.vocab_size)
        try:
            self._matchers = Matchers(vocabulary, self._lark, tokens, engine.vocab_size, engine.device)
        except ValueError as error:
            raise self._refused(str(error)) from None
        self._device = engine.device
        self.reset(0, [])

    def __getstate__(self) -> dict[str, Any]:
        """Gives what there was before `setup`: matchers belong to a process."""
        return {k: v for k, v in vars(self).items() if k not in ("_at", "_consumed", "_device")} | {"_matchers": None}

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._at = torch.full((n_particles,), START, dtype=torch.int64, device=self._device)
        self._consumed = 0
        self._matchers.add(self)

    def reindex(self, ancestors: Tensor) -> None:
        self._at = self._at[ancestors]

    def _states(self, state: State) -> Tensor:
        """Returns (N,) int64 states after `state.step` tokens; NOWHERE for particles that ended earlier, which nobody
        asks about."""
        if state.step < self._consumed or len(self._at) != len(state.lengths):
            self.reset(len(state.lengths), state.prompt)
        n_new, going = state.step - self._consumed, ~state.finished
        if state.last_tokens is not None:
            going |= state.last_tokens >= 0
        # else they would have to be traced back, as they are where some have waited
        if n_new == 1 and state.last_tokens is not None and state.segments is None:
            columns = [state.last_tokens]
        else:
            columns = list(state.tokens[:, self._consumed :].T) if n_new else []
        at = torch.where(going, self._at, NOWHERE)
        stops = torch.tensor(sorted(state.stop_token_ids), dtype=torch.int64, device=at.device)
        for token in columns:
            at = self._matchers.follow(at, torch.where(torch.isin(token, stops), -1, token))
        return at

    def _go_on(self, state: State) -> Tensor:
        """Returns the same, and goes on from there. `complete` does not, so groups at one step are equally far."""
        self._at, self._consumed = self._states(state), state.step
        self._matchers.free()
        return self._at

    def prefix(self, state: State) -> Tensor:
        return log_of(self._go_on(state) != NOWHERE)

    def complete(self, state: State) -> Tensor:
        return log_of(self._matchers.accepts(self._states(state)))

    def logw_next(self, state: State) -> Masked:
        at = torch.where(state.finished, NOWHERE, self._go_on(state))
        return self._matchers.mask(at, [v for v in state.stop_token_ids if v < self._matchers.vocab_size])


def _check_text(name: str, text: Any, most: int = MAX_CHARACTERS) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name}={short(text)}: must be a string")
    if not text.strip():
        raise ValueError(f"{name}={text!r}: is empty")
    if len(text) > most:
        raise ValueError(f"{name}: has {len(text)} characters; must have at most {most}")


def _shortened(reason: str) -> str:
    """Returns llguidance's reason without its quotation of the grammar."""
    return re.split(r"\n +\d+ \| ", reason)[0].strip()


class JsonSchema(Grammar):
    """φ = 1 if the generated text, without the stop token, is JSON that a JSON Schema allows, else 0. See `Grammar`.

    Members of an object come in the order of the schema's `properties`, then others if they are allowed.

    Args:
        schema: the JSON Schema, as a dict or as JSON text.
        whitespace: "compact" (default): none, as `json.dumps(value, separators=(",", ":"))` writes it; "flexible": any,
            wherever JSON may have some.

    Raises:
        ValueError: the schema is no JSON object; in `prepare`: it has what llguidance does not support.
    """

    per_particle = ("_at",)

    def __init__(self, schema: Mapping[str, Any] | str, whitespace: str = "compact") -> None:
        check_choice("whitespace", whitespace, WHITESPACE)
        if isinstance(schema, str):
            _check_text("schema", schema)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"schema={short(schema)}: is no JSON: {error}") from None
        if not isinstance(schema, Mapping):
            raise ValueError(f"schema={short(schema)}: must be a JSON Schema, an object")
        self.schema, self.whitespace = dict(schema), whitespace
        self._take(self._lark_of(self.schema), f"schema={short(self.schema)}")

    def _lark_of(self, schema: Mapping[str, Any]) -> str:
        """Writes a grammar of the JSON that a schema allows. ValueError: it is none, or too long."""
        if "x-guidance" in schema:  # which could have parts of the schema ignored
            raise ValueError("schema: x-guidance: options of the library are not taken; for whitespace say whitespace=")
        try:
            text = json.dumps({**schema, "x-guidance": WHITESPACE[self.whitespace]}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema: cannot be written as JSON: {error}") from None
        _check_text("schema", text)
        return f"start: %json {text}"

    def _refused(self, reason: str) -> ValueError:
        """Names the smallest part of the schema that is refused by itself, for the same reason."""
        reason, path = _shortened(reason).removeprefix(_OF_JSON), "$"
        part: Mapping[str, Any] = self.schema
        rest = {name: part[name] for name in ("$defs", "definitions") if name in part}
        while True:
            for name, inner in _subschemas(part):
                failed, reasons = LLMatcher.validate_grammar_with_warnings(self._lark_of({**rest, **inner}))
                if failed and _shortened(reasons[0]).endswith(reason):
                    path, part = path + name, inner
                    break
            else:
                return super()._refused(reason if path == "$" else f"at {path}: {reason}")


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Lists what a schema holds that may be one, with its name: objects, and those in arrays and objects."""
    for key, value in schema.items():
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        if isinstance(value, Mapping):
            yield f".{key}", value
        for name, part in inner:
            if isinstance(part, Mapping):
                yield f".{key}[{name}]" if isinstance(value, list) else f".{key}.{name}", part


class Choice(Regex):
    """φ = 1 if the generated text, without the stop token, is one of several, else 0. See `Regex`.

    Args:
        choices: the texts.

    Raises:
        ValueError: there are none, or what is no text; as of `Regex`.
    """

    per_particle = ("_at",)

    def __init__(self, choices: Sequence[str]) -> None:
        if isinstance(choices, (str, bytes)) or not isinstance(choices, Sequence) or not choices:
            raise ValueError(f"choices={short(choices)}: must be a list of at least one text")
        if not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"choices={short(choices)}: must be a list of texts")
        if (size := sum(map(len, choices)) + len(choices)) > MAX_GRAMMAR:
            raise ValueError(f"choices: have {size} characters, one more each; must have at most {MAX_GRAMMAR}")
        self.choices = list(choices)
        super().__init__("|".join(map(_escape, self.choices)))


def _escape(text: str) -> str:
    """Writes a pattern that matches `text` alone."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
