"""Prompt sources: rows of any supported format, checked, de-duplicated, shuffled by the seed, and cut to a limit."""

import datetime
import difflib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laif_jax.config.schema import PromptSource, SymbolsSpec
from laif_jax.data.readers import read_source
from laif_jax.records import DataError, Message, Prompt, content_id
from laif_jax.worlds import symbols as symbols_world

log = logging.getLogger(__name__)

# Speakers as other data sets name them.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True)
class SourceRow:
    """A prompt, and the completions that the data already holds: generator's name -> text."""

    prompt: Prompt
    completions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceReport:
    """What happened to a source's rows.

    Attributes:
      read: rows read. empty: skipped, the prompt has no text. duplicates: skipped, an earlier row has the same prompt.
      kept: rows returned, after `limit`.
    """

    read: int
    empty: int
    duplicates: int
    kept: int


class SourceRows(list[SourceRow]):
    """A list of rows that knows what was skipped."""

    def __init__(self, rows: Iterable[SourceRow], report: SourceReport):
        super().__init__(rows)
        self.report = report


def load_prompts(
    source: PromptSource,
    root: str | None = None,
    seed: int = 0,
    symbols: SymbolsSpec | None = None,
    *,
    shuffle: bool = True,
) -> SourceRows:
    """Reads a source's prompts.

    The order depends on the seed and on the prompts' content alone, not on the order of rows or files; so a `limit`
    takes the same prompts from the same data however it is stored, and a larger limit takes those and more.
    Columns other than the prompt and the completions are kept in `Prompt.meta`.

    Args:
      root: put before a relative `source.path`.
      symbols: the synthetic world's settings, for `kind: symbols`; None: its defaults.
      shuffle: False: the same rows, in the order of the data.

    Raises:
      DataError: a file or column is missing, a row is malformed, or no prompt is left; says where and what to do.
    """
    if source.kind == "symbols":
        return _from_world(source, seed, symbols)
    read = empty = duplicates = 0
    rows: dict[str, SourceRow] = {}
    for place, row in read_source(source, root):
        read += 1
        made = _to_row(place, row, source)
        if made is None:
            empty += 1
        elif made.prompt.id in rows:
            duplicates += 1
        else:
            rows[made.prompt.id] = made
    if not rows:
        raise DataError(
            f"{source.path}: no prompt in it ({read} rows read, {empty} of them with an empty `{source.prompt}`). "
            "Check the file and the column that `prompt` names."
        )
    kept = _select(list(rows.values()), source.limit, seed, shuffle)
    report = SourceReport(read, empty, duplicates, len(kept))
    if empty or duplicates:
        log.warning(
            "%s: of %d rows, %d with an empty prompt and %d duplicates were skipped",
            source.path,
            read,
            empty,
            duplicates,
        )
    return SourceRows(kept, report)


def _select(rows: list[SourceRow], limit: int | None, seed: int, shuffle: bool) -> list[SourceRow]:
    """The first `limit` rows of a shuffle that sorts by a hash of seed and prompt."""
    order = sorted(range(len(rows)), key=lambda i: content_id([seed, rows[i].prompt.id]))[:limit]
    return [rows[i] for i in (order if shuffle else sorted(order))]


def _from_world(source: PromptSource, seed: int, symbols: SymbolsSpec | None) -> SourceRows:
    n = source.limit or 0
    prompts = symbols_world.make_prompts(symbols or SymbolsSpec(), n, seed, source.split)
    return SourceRows(map(SourceRow, prompts), SourceReport(n, 0, 0, len(prompts)))


# ---- one row ---------------------------------------------------------------------------------------------------


def _to_row(place: str, row: Mapping[str, Any], source: PromptSource) -> SourceRow | None:
    """The row's prompt and completions; None if the prompt is empty."""
    value = read_column(place, row, source.prompt, "prompt")
    completions: dict[str, str] = {}
    if value is None or isinstance(value, str):
        messages = [Message(role="user", content=value)] if value and value.strip() else []
    else:
        messages = read_messages(place, source.prompt, value)
        if messages and messages[-1].role == "assistant":  # a whole dialogue: its last answer is a completion
            completions[source.prompt] = messages.pop().content
        if not any(message.role == "user" and message.content.strip() for message in messages):
            messages = []
    if not messages:
        return None
    if source.completions is not None:
        column = read_column(place, row, source.completions, "completions")
        completions |= _completions(place, source.completions, column)
    used = {source.prompt, source.completions}
    meta = {str(key): plain_value(value) for key, value in row.items() if key not in used}
    prompt = Prompt(messages=tuple(messages), source=source.path or "", split=source.split, meta=meta)
    return SourceRow(prompt, completions)


def read_column(place: str, row: Mapping[str, Any], name: str, option: str) -> Any:
    """The value of a column, which `option` of the data source names. Raises DataError if there is none."""
    if name in row:
        return row[name]
    columns = [str(key) for key in row]
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise DataError(
        f"{place}: no column `{name}`; there are: {', '.join(columns) or 'none'}.{hint} "
        f"`{option}` of the data source names the column."
    )


def read_messages(place: str, column: str, value: Any) -> list[Message]:
    """A list of {role, content} (or {from, value}) objects."""
    if not isinstance(value, Sequence):
        raise DataError(
            f"{place}: `{column}` must be a text or a list of messages, found {type(value).__name__}"
        )
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{place}: message {number} of `{column}` must be an object with `role` and `content`"
            )
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES:
            raise DataError(
                f"{place}: message {number} of `{column}` has role {role!r}; known: {', '.join(_ROLES)}"
            )
        if not isinstance(content, str):
            raise DataError(
                f"{place}: message {number} of `{column}` must have a text as `content`, found "
                f"{type(content).__name__}"
            )
        messages.append(Message.model_validate({"role": _ROLES[role], "content": content}))
    return messages


def _completions(place: str, column: str, value: Any) -> dict[str, str]:
    """Generator -> text. A plain text is one completion, by a generator of the column's name; null means none."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {column: value} if value.strip() else {}
    if not isinstance(value, Mapping):
        raise DataError(
            f"{place}: `{column}` must map generators to texts, or be a text; found {type(value).__name__}"
        )
    wrong = {name: text for name, text in value.items() if not isinstance(text, str | None)}
    if wrong:
        name, text = next(iter(wrong.items()))
        raise DataError(
            f"{place}: the completion of {name!r} in `{column}` must be a text, found {type(text).__name__}"
        )
    return {str(name): text for name, text in value.items() if text and text.strip()}


def plain_value(value: Any) -> Any:
    """A column's value as JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
