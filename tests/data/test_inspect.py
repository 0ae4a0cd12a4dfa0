"""What `laif inspect` shows can be read without colour, and says what the arrays say."""

from rich.console import Console

from laif_jax.data.chat import encode_dialogue, encode_pair
from laif_jax.data.inspect import render
from laif_jax.data.pipeline import preference_batches, sft_batches
from tests.data.tokenizers_ import chatml

ASK = [{"role": "user", "content": "hello"}]
TALK = [
    *ASK,
    {"role": "assistant", "content": "fine"},
    {"role": "user", "content": "and?\n"},
    {"role": "assistant", "content": "yes"},
]
LIMITS = {"max_length": 70, "max_prompt_length": 40}


def shown(renderable, color=False) -> str:
    console = Console(
        width=100, color_system="truecolor" if color else None, force_terminal=color, record=True
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_dialogues_show_what_is_learned_cut_and_ended():
    tokenizer = chatml()
    examples = [
        encode_dialogue(tokenizer, TALK, "human_assistant", **LIMITS),
        encode_dialogue(tokenizer, ASK, "model", completion="you " * 40, **LIMITS),
        encode_dialogue(
            tokenizer, ASK, "human_assistant", completion="half", finish_reason="length", **LIMITS
        ),
    ]
    batches = sft_batches(
        examples, batch_size=1, max_length=160, pad_id=2, packing=True, epochs=1, shuffle=False
    )
    text = shown(render(batches.at(0), tokenizer, flags=batches.flags))
    assert "3 segments" in text
    assert "segment 2/3, example 1" in text
    lines = [line.strip("\u2502 ") for line in text.splitlines()]
    assert "Assistant:\u2423\u27e6fine<|im_end|>\u27e7\u21b5" in lines  # learned, then the template's newline
    assert "Assistant:\u2423\u27e6yes<|im_end|>\u27e7 END" in lines
    assert "Assistant:\u2423\u27e6half\u27e7 NO END" in lines
    assert "and?\u21b5" in text
    assert "CUT\u2026" in text
    assert "\u2026CUT NO END" in text
    assert f"{sum(e.supervised for e in examples)} learned" in text
    # Without the examples, the arrays alone still show masks and ends.
    bare = shown(render(batches.at(0), tokenizer))
    assert "\u27e6half\u27e7 NO END" in bare
    assert "CUT\u2026" not in bare


def test_colour_follows_the_loss_weight():
    tokenizer = chatml()
    example = encode_dialogue(tokenizer, ASK, "human_assistant", completion="world", **LIMITS)
    batch = sft_batches([example], batch_size=1, max_length=72, pad_id=2, epochs=1).at(0)
    text = shown(render(batch, tokenizer), color=True)
    assert "\x1b[1;32mworld\x1b[0m" in text
    assert "\x1b[2mHuman: hello" in text
    batch["loss_mask"][batch["loss_mask"] > 0] = 0
    assert "\x1b[1;32mworld" not in shown(render(batch, tokenizer), color=True)


def test_pairs_show_both_sides_and_their_probability():
    tokenizer = chatml()
    pairs = [
        encode_pair(tokenizer, ASK, f"good{i}", f"bad{i}", "human_assistant", p_chosen=0.5 + i / 10, **LIMITS)
        for i in range(3)
    ]
    for packing in (False, True):
        batches = preference_batches(
            pairs, batch_size=4, max_length=70, pad_id=2, packing=packing, epochs=1, shuffle=False
        )
        text = shown(render(batches.at(0), tokenizer, flags=batches.flags))
        for i in range(3):
            panel = text.split(f"pair {i}: p_chosen = 0.{5 + i}00")[1].split("\u2570")[0]
            chosen, rejected = panel.split("rejected (row")
            assert f"good{i}" in chosen
            assert f"bad{i}" in rejected
        assert "3 pairs" in text
    few = shown(render(batches.at(0), tokenizer, max_rows=1))
    assert "pair 1" not in few
    assert "only the first 1 are shown" in few
