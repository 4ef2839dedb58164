"""Texts are what follows the prompt's text, under decoders of every family."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastsmc import texts
from fastsmc.texts import CONTEXT, texts_after

BYTES = [f"<0x{b:02X}>" for b in (0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82)]


def sentencepiece():
    """As Llama 2: ▁ is a space, the decoder strips one at the start, bytes stand for rare characters."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁yes", "▁no", "▁", "y", "."]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"), tokens


def metaspace():
    tokens = ["<unk>", "<s>", "</s>", "▁yes", "▁no", "▁", "y", "."]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>"), tokens


def byte_level(**options):
    tokens = ["<s>", "</s>", "a", "Ġa", "Ã", "©", "ð", "Ł", "Ļ", "Ĥ", "Ġ", ".", "Ġ."]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options), tokens


#: transformers takes the space before a full stop away
CLEAN = {
    "clean_up_tokenization_spaces": True,
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
}


def word_piece():
    tokens = ["[UNK]", "[CLS]", "un", "##able", "##s", "yes"]
    inner = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="[CLS]", eos_token="[UNK]"), tokens


@pytest.mark.parametrize(
    ("make", "prompt", "sequence", "text"),
    [
        (sentencepiece, ["<s>", "▁yes"], ["▁no", "y", "</s>"], " noy"),
        (sentencepiece, ["<s>", "▁yes"], ["▁", "▁no"], "  no"),
        (sentencepiece, ["<s>", "▁yes"], ["</s>"], ""),
        (sentencepiece, ["<s>", "▁yes", "<0xC3>"], ["<0xA9>", "▁no"], "é no"),
        (sentencepiece, ["<s>", "▁yes", "<0xF0>", "<0x9F>"], ["<0x99>", "<0x82>"], "🙂"),
        (sentencepiece, ["<s>", "▁yes", *["</s>"] * 40], ["▁no"], " no"),
        (metaspace, ["<s>", "▁yes"], ["▁no", "."], " no."),
        (metaspace, ["y"], ["▁yes"], " yes"),
        (byte_level, ["a"], ["Ġa", "a"], " aa"),
        (byte_level, ["a", "Ã"], ["©"], "é"),
        (byte_level, ["a", "ð", "Ł"], ["Ļ", "Ĥ", "a"], "🙂a"),
        (byte_level, ["a"], ["Ã"], "\ufffd"),
        (lambda: byte_level(**CLEAN), ["a"], ["Ġ.", "Ġa"], " . a"),
        (word_piece, ["un"], ["##able", "##s", "yes"], "ables yes"),
        (word_piece, ["un"], ["yes"], " yes"),
    ],
)
def test_the_text_is_what_follows_the_prompts(make, prompt, sequence, text):
    tokenizer, tokens = make()
    assert texts_after(tokenizer, [tokens.index(t) for t in prompt], [[tokens.index(t) for t in sequence]]) == [text]


@pytest.mark.parametrize("make", [sentencepiece, metaspace, byte_level, word_piece])
def test_prompt_and_text_are_the_whole(make):
    """A short tail of the prompt is context enough: as with the whole prompt, for random tokens."""
    tokenizer, tokens = make()
    rng = random.Random(0)
    for _ in range(300):
        prompt, sequence = (rng.choices(range(len(tokens)), k=rng.randint(1, 40)) for _ in range(2))
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, whole = tokenizer.decode(prompt, **options), tokenizer.decode(prompt + sequence, **options)
        [text] = texts_after(tokenizer, prompt, [sequence])
        if whole.startswith(before):
            assert text == whole[len(before) :]
        else:
            assert text == whole[len(before.rstrip("\ufffd")) :] and whole.startswith(before.rstrip("\ufffd"))


def test_each_history_is_decoded_once_with_a_short_tail(monkeypatch):
    tokenizer, _ = byte_level()
    seen = []
    decode = texts.decode
    monkeypatch.setattr(texts, "decode", lambda t, sequences: seen.extend(sequences) or decode(t, sequences))
    assert texts_after(tokenizer, [2] * 5000, [[2, 3], [3], [2, 3]] * 1000) == ["a a", " a", "a a"] * 1000
    assert len(seen) == 3 and max(map(len, seen)) <= CONTEXT + 2
