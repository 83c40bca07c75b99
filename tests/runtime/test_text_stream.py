"""Streamed text is the text of all tokens, for every kind of tokenizer and any tokens."""

from __future__ import annotations

import string
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vlmguard.runtime.chat.text_stream import TextStream

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
BYTES = [f"<0x{number:02X}>" for number in range(256)]
WORDS = [
    "▁",
    "▁▁",
    "▁the",
    "lamp",
    "▁lamp",
    "n't",
    ".",
    "▁.",
    "é",
    "▁日本",
    "本",
    "😀",
    "\n",
    "\n▁",
    "��",
    "\ufffd",
    "a\u0301",
]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def with_vocabulary(words: Sequence[str], decoder: object) -> Tokenizer:
    """Ids in the order of the words, behind `<s>` and `</s>`."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(("<s>", "</s>", *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<added>", special=False)])
    if decoder is not None:
        tokenizer.decoder = decoder  # type: ignore[assignment]
    return tokenizer


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return with_vocabulary([*alphabet, "Ġlamp", "Ġ", "ĊĊ", "âĤ", "ðŁĺ", "ĢðŁ"], decoders.ByteLevel())


TOKENIZERS = {
    "byte-level": byte_level(),
    "sentencepiece with bytes (Llama)": with_vocabulary([*BYTES, *WORDS], decoders.Sequence(LLAMA)),
    "sentencepiece with bytes (Gemma)": with_vocabulary([*BYTES, *WORDS], decoders.Sequence(LLAMA[:3])),
    "sentencepiece without bytes": with_vocabulary(WORDS, decoders.Metaspace()),
    "word pieces": with_vocabulary(["the", "lamp", "##s", "##.", "n't", "'s", ",", "é", "##é"], decoders.WordPiece()),
    "words with a suffix": with_vocabulary(["the</w>", "la", "mp</w>", ".</w>", "é"], decoders.BPEDecoder()),
    "no decoder": with_vocabulary(["the", "lamp", "é"], None),
}


def streamed(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[list[str], str]:
    """The pieces, the last of them that of the end; and the text of all tokens."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    stream = TextStream(tokenizer, decode)
    return [*map(stream.add, tokens), stream.end()], decode(tokens).strip()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_answer(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    beyond = tokenizer.get_vocab_size() + 3  # models have more logits than their tokenizers have tokens
    pieces, text = streamed(tokenizer, data.draw(st.lists(st.integers(0, beyond), max_size=40)))
    assert "".join(pieces) == text


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece with bytes (Llama)", "sentencepiece with bytes (Gemma)"])
@settings(max_examples=200, deadline=None)
@given(text=st.text("aé€日😀 \n" + string.punctuation, max_size=30))
def test_characters_of_several_tokens_come_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text) if text else []
    spelled = [*"".join(word for word, _ in letters)] if name == "byte-level" else [BYTES[n] for n in text.encode()]
    pieces, whole = streamed(tokenizer, [tokenizer.token_to_id(one) for one in spelled])
    assert "".join(pieces) == whole == text.strip() and not any(INCOMPLETE in piece for piece in pieces)


def test_a_piece_is_returned_as_soon_as_nothing_can_change_it() -> None:
    def pieces(name: str, *words: str) -> list[str]:
        tokenizer = TOKENIZERS[name]
        return streamed(tokenizer, [tokenizer.token_to_id(word) for word in words])[0]

    assert pieces("byte-level", "a", *"âĤ¬", "b") == ["a", "", "", "€", "b", ""]
    assert pieces("byte-level", "a", "Ġlamp", "Ġ", "Ġlamp", "Ġ") == ["a", " lamp", "", "  lamp", "", ""]
    assert pieces("byte-level", *"âĤâĤ", "a") == ["", "", INCOMPLETE, "", f"{INCOMPLETE}a", ""]
    llama = "sentencepiece with bytes (Llama)"
    assert pieces(llama, "▁the", "▁lamp", "<s>", ".") == ["the", " lamp", "", ".", ""]
    assert pieces(llama, *(BYTES[n] for n in "é".encode()), "</s>", "lamp") == ["", "", "", "élamp", ""]
    # A run of bytes that is no UTF-8 is a replacement character for each byte, an "a" among them too.
    assert pieces(llama, BYTES[ord("a")], BYTES[0xE2], "lamp") == ["", "", f"{INCOMPLETE * 2}lamp", ""]
    assert pieces(llama, "lamp", BYTES[0xE2], BYTES[0x82]) == ["lamp", "", "", INCOMPLETE * 2]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_work_is_in_proportion_to_the_answer(name: str) -> None:
    tokenizer, decoded = TOKENIZERS[name], 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return tokenizer.decode(list(ids))

    stream, tokens = TextStream(tokenizer, decode), [2 + number % 7 for number in range(2000)]
    for token in tokens:
        stream.add(token)
    stream.end()
    assert decoded <= 8 * len(tokens)
