"""Tokens as text and bytes; stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.serving.text import TokenText, find_stop, tokens_before

SAMPLE = "Grüße, 世界! naïve café\n\ttabs — and ✓ emoji 🦆 A B"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces as U+2581, unknown characters as <0xNN>."""
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyzAB"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(make):
    text = TokenText(make())
    ids = text.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    assert b"".join(text.bytes_of(i) for i in ids) == SAMPLE.encode()
    assert text.decode(ids) == SAMPLE


def test_special_tokens_show_their_name_and_leave_the_text():
    text = TokenText(load_tokenizer("symbols"))
    eos = text.tokenizer.eos_token_id
    ids = text.tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert text.string(eos) == "<eos>"
    assert text.decode([*ids, eos]) == "abc"
    assert text.bytes_of(10**6) == b""


def test_a_part_of_a_character_shows_as_replacement():
    text = TokenText(byte_level())
    ids = text.tokenizer("Ж", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert [text.string(i) for i in ids] == ["�", "�"]
    assert bytes([*text.bytes_of(ids[0]), *text.bytes_of(ids[1])]).decode() == "Ж"


@given(st.text("ab|", max_size=30), st.lists(st.text("ab|", min_size=1, max_size=3), max_size=3))
def test_the_earliest_stop_string_cuts(text, stops):
    place = find_stop(text, stops)
    if place is None:
        assert not any(stop in text for stop in stops)
    else:
        assert not any(stop in text[:place] for stop in stops)
        assert any(text.startswith(stop, place) for stop in stops)


@given(st.lists(st.text("ab", max_size=4), max_size=20), st.integers(0, 40))
def test_tokens_before_is_the_shortest_prefix_that_is_long_enough(pieces, length):
    def decode(ids):
        return "".join(pieces[i] for i in ids)

    count = tokens_before(decode, range(len(pieces)), length)
    assert count == len(pieces) or len(decode(range(count))) >= length
    assert count == 0 or len(decode(range(count - 1))) < length
