"""A batch made visible: what is learned from, what is not, where turns and segments end, what was cut."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from laif_jax.data.plan import ENDED, PROMPT_CUT, RESPONSE_CUT

Batch = Mapping[str, np.ndarray]

_CONTEXT, _TARGET, _SPECIAL, _NOTE = "dim", "bold green", "bold magenta", "bold yellow"
_OPEN, _CLOSE = "\u27e6", "\u27e7"  # ⟦ ⟧ around what is learned, so that it reads without colour
_NEWLINE, _SPACE = "\u21b5", "\u2423"  # ↵ ␣


def render(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    *,
    flags: np.ndarray | None = None,
    max_rows: int = 4,
) -> RenderableType:
    """A batch of dialogues or of pairs, for a terminal; readable without colour too.

    Args:
      batch: from `sft_batches` or `preference_batches`.
      flags: `Batches.flags`: adds what was cut, which the arrays do not say.
      max_rows: dialogues' rows, or pairs, shown.
    """
    body = _pairs(batch, tokenizer, flags) if "pair_index" in batch else _rows(batch, tokenizer, flags)
    parts: list[RenderableType] = [legend(), _summary(batch)]
    panels = list(itertools.islice(body, max_rows + 1))
    parts += panels[:max_rows]
    if len(panels) > max_rows:
        parts.append(Text(f"... only the first {max_rows} are shown", _NOTE))
    return Group(*parts)


def legend() -> Text:
    """What the marks mean."""
    return Text.assemble(
        ("context", _CONTEXT),
        " (not learned)   ",
        (f"{_OPEN}learned{_CLOSE}", _TARGET),
        " (loss weight 1)   ",
        ("<special token>", _SPECIAL),
        (f"   {_NEWLINE}", _CONTEXT),
        " newline   ",
        ("END", _NOTE),
        " end of turn   ",
        ("NO END", _NOTE),
        " the answer did not end by itself   ",
        ("CUT", _NOTE),
        " truncated",
    )


def _summary(batch: Batch) -> Text:
    used = int((batch["segment_ids"] > 0).sum())
    learned = int((batch["loss_mask"] > 0).sum())
    micro, rows, length = batch["tokens"].shape
    text = (
        f"{micro} micro-batch(es) x {rows} rows x {length} tokens: {used} tokens ({used / (micro * rows * length):.0%} "
        f"of the places), {learned} learned"
    )
    if "pair_index" in batch:
        text += f", {int((batch['weight'] > 0).sum())} pairs"
    return Text(text)


# ---- dialogues and pairs ---------------------------------------------------------------------------------------


def _rows(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    flags: np.ndarray | None,
) -> Iterator[RenderableType]:
    micro, rows, _ = batch["tokens"].shape
    for a in range(micro):
        for row in range(rows):
            count = int(batch["segment_ids"][a, row].max())
            if count == 0:
                continue
            parts: list[RenderableType] = []
            for segment in range(1, count + 1):
                index = int(batch["example_index"][a, row, segment - 1])
                bits = None if flags is None else int(flags[index, 0])
                mark = Text(f"\u2500\u2500 segment {segment}/{count}, example {index} ", _NOTE)
                text = _segment(batch, a, row, segment, tokenizer, bits)
                parts += [mark, text] if count > 1 else [text]
            padding = int((batch["segment_ids"][a, row] == 0).sum())
            name = f"example {int(batch['example_index'][a, row, 0])}" if count == 1 else f"{count} segments"
            title = f"micro-batch {a}, row {row}: {name}"
            yield Panel(
                Group(*parts), title=title, subtitle=f"{padding} places of padding", title_align="left"
            )


def _pairs(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    flags: np.ndarray | None,
) -> Iterator[RenderableType]:
    per_row = _segments_per_row(batch)
    for a, slot in np.argwhere(batch["pair_index"] >= 0):
        index = int(batch["pair_index"][a, slot])
        parts: list[RenderableType] = []
        for number, side in enumerate(("chosen", "rejected")):
            row, segment = divmod(int(batch[side][a, slot]), per_row)
            bits = None if flags is None else int(flags[index, number])
            parts.append(Text(f"\u2500\u2500 {side} (row {row}, segment {segment + 1})", _NOTE))
            parts.append(_segment(batch, int(a), row, segment + 1, tokenizer, bits))
        p, weight = float(batch["p_chosen"][a, slot]), float(batch["weight"][a, slot])
        title = f"micro-batch {a}, pair {index}: p_chosen = {p:.3f}" + (
            f", weight {weight:g}" if weight != 1 else ""
        )
        yield Panel(Group(*parts), title=title, title_align="left")


def _segments_per_row(batch: Batch) -> int:
    """S: there are R / 2 x S pair slots."""
    return 2 * batch["pair_index"].shape[1] // batch["tokens"].shape[1]


# ---- tokens ----------------------------------------------------------------------------------------------------


def _segment(
    batch: Batch, a: int, row: int, segment: int, tokenizer: PreTrainedTokenizerBase, bits: int | None
) -> Text:
    """One segment's text, coloured by loss weight, and what became of its ends."""
    segments = batch["segment_ids"][a, row]
    places = np.flatnonzero(segments == segment)
    if "prefix" in batch:  # it continues the start of the segment before it
        shared = int(batch["prefix"][a, row, places[0]])
        places = np.concatenate([np.flatnonzero(segments == segment - 1)[:shared], places])
    tokens = batch["tokens"][a, row, places].tolist()
    weights = batch["loss_mask"][a, row, places].tolist()
    text = Text()
    if bits is not None and bits & PROMPT_CUT:
        text.append("CUT\u2026 ", _NOTE)
    special = set(tokenizer.all_special_ids)
    start = 0
    while start < len(tokens):  # runs of equal weight, decoded together: one character may be several tokens
        stop = start + 1
        while stop < len(tokens) and weights[stop] == weights[start]:
            stop += 1
        learned = weights[start] > 0
        text.append(_OPEN if learned else "", _TARGET)
        _append_run(text, tokens[start:stop], tokenizer, special, _TARGET if learned else _CONTEXT)
        weight = weights[start]
        text.append((_CLOSE if weight == 1 else f"{_CLOSE}\u00d7{weight:g}") if learned else "", _TARGET)
        start = stop
    if bits is not None and bits & RESPONSE_CUT:
        text.append(" \u2026CUT", _NOTE)
    ended = bool(bits & ENDED) if bits is not None else tokens[-1] in special
    text.append(" END" if ended else " NO END", _NOTE)
    return text


def _append_run(
    text: Text, tokens: list[int], tokenizer: PreTrainedTokenizerBase, special: set[int], style: str
) -> None:
    start = 0
    for i in range(len(tokens) + 1):
        if i < len(tokens) and tokens[i] not in special:
            continue
        if i > start:
            text.append(
                _visible(str(tokenizer.decode(tokens[start:i], clean_up_tokenization_spaces=False))), style
            )
        if i < len(tokens):
            name = str(tokenizer.convert_ids_to_tokens(tokens[i]))
            text.append(name if name.startswith("<") else f"<{name}>", _SPECIAL)
        start = i + 1


def _visible(text: str) -> str:
    """Line ends shown and kept; a lone or trailing space shown."""
    text = text.replace("\n", f"{_NEWLINE}\n")
    stripped = text.rstrip(" ")
    return stripped + _SPACE * (len(text) - len(stripped))
