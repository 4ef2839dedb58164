"""The text of generated tokens: exactly what they add to the text of the prompt, under any tokenizer.

A tokenizer cannot decode a continuation alone: SentencePiece's decoders drop the space of the first word, WordPiece's
know only from the word before whether there is one, and a character may begin in the prompt. So the prompt's last
tokens are decoded with the continuation and without it, and the text is the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsmc.counterfactuals import Counterfactuals
    from fastsmc.population import Population

#: tokens of the prompt that are decoded with a continuation: enough for a character that began in the prompt
CONTEXT = 8

#: tokens of a sequence, from one place to another
Span = tuple[Sequence[int], int, int]

#: stands for bytes that are no whole character
_PARTIAL = "\ufffd"


def population_texts(tokenizer: Any, population: Population) -> list[str]:
    """Decodes what each particle adds to the prompt's text, up to the stop token or stop string that it ended with."""
    prompt, strings, stops = population.prompt_token_ids, population.params.stop, population.params.stop_token_ids
    ids = [list(each[:-1] if stops and each and each[-1] in stops else each) for each in population.token_ids]
    texts = texts_after(tokenizer, prompt, ids)
    if not strings or population.finish_reasons is None:
        return texts
    before = texts_after(tokenizer, prompt, [ids[:-1] for ids in population.token_ids])
    out = []
    for text, shorter, reason in zip(texts, before, population.finish_reasons, strict=True):
        known = len(shorter.rstrip(_PARTIAL))
        places = [(at + len(s), at) for s in strings if (at := text.find(s, max(0, known + 1 - len(s)))) >= 0]
        out.append(text[: min(places)[1]] if places and reason == "stop" else text)
    return out


def texts_after(tokenizer: Any, prompt: Sequence[int], sequences: Sequence[Sequence[int]]) -> list[str]:
    """Decodes what each sequence of token ids adds to the prompt's text, without special tokens."""
    if not sequences:
        return []
    length = CONTEXT
    tail = list(prompt[-length:])
    [before] = decode(tokenizer, [tail])
    while not before.strip().strip(_PARTIAL) and length < len(prompt):  # special tokens and spaces: look further back
        length *= 4
        tail = list(prompt[-length:])
        [before] = decode(tokenizer, [tail])
    distinct = list(dict.fromkeys(map(tuple, sequences)))
    whole = decode(tokenizer, [[*tail, *sequence] for sequence in distinct])
    known = {sequence: _beyond(before, text) for sequence, text in zip(distinct, whole, strict=True)}
    return [known[tuple(sequence)] for sequence in sequences]


def spell_diffs(tokenizer: Any, found: Counterfactuals) -> list[str]:
    """Spells what becomes of the text in each particle, as [-what goes-] and {+what comes+}; no special tokens."""
    spans: list[list[tuple[str, Span, Span]]] = []
    for parts, ids in zip(found.diff(), found.token_ids, strict=True):
        a = b = 0
        spans.append([])
        for op, old, new in parts:
            spans[-1].append((op, (found.factual_ids, a, a + len(old)), (ids, b, b + len(new))))
            a, b = a + len(old), b + len(new)
    ends = {tuple(ids[:at]) for each in spans for _, *both in each for ids, *places in both for at in places}
    known = dict(zip(ends, texts_after(tokenizer, found.prompt_token_ids, list(ends)), strict=True))

    def spell(span: Span) -> str:
        ids, begin, end = span
        return _beyond(known[tuple(ids[:begin])], known[tuple(ids[:end])])

    out = []
    for each in spans:
        texts = [(op, spell(old), spell(new)) for op, old, new in each]
        out.append("".join(new if op == "equal" else _marked(old, new) for op, old, new in texts))
    return out


def _marked(old: str, new: str) -> str:
    return f"[-{old}-]" * bool(old) + f"{{+{new}+}}" * bool(new)


def is_whole(text: str) -> bool:
    """Says whether a text does not end within a character."""
    return not text.endswith(_PARTIAL)


def strip_partial(text: str) -> str:
    """Takes bytes off a text's end that are no whole character."""
    return text.rstrip(_PARTIAL)


def _beyond(before: str, text: str) -> str:
    """Takes `before` off `text`, where its last character may have been completed or its end rewritten."""
    if text.startswith(before):
        return text[len(before) :]
    whole = before.rstrip(_PARTIAL)
    if text.startswith(whole):
        return text[len(whole) :]
    same = 0
    while same < min(len(before), len(text)) and before[same] == text[same]:
        same += 1
    return text[same:]


def decode(tokenizer: Any, sequences: list[list[int]]) -> list[str]:
    """Decodes as the tokenizer's model has it: transformers' beautification (" ." to ".") would change texts."""
    if not sequences:  # of which transformers 5 makes one text
        return []
    options = {"skip_special_tokens": True}
    if any(base.__name__ == "PreTrainedTokenizerBase" for base in type(tokenizer).__mro__):
        options["clean_up_tokenization_spaces"] = False
    if hasattr(tokenizer, "batch_decode"):
        return tokenizer.batch_decode(sequences, **options)
    return [tokenizer.decode(sequence, **options) for sequence in sequences]
