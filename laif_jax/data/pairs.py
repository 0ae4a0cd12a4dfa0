"""Compared responses from files or from a critic's labels: read, checked, split by prompt, and tokenised."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from laif_jax.config.schema import PairSource, PromptSource, RewardSpec
from laif_jax.data.chat import Encoded, EncodedPair, encode_pair
from laif_jax.data.readers import read_source
from laif_jax.data.sources import read_column, read_messages
from laif_jax.data.templates import TemplateName
from laif_jax.records import DataError, Message, Preference, Prompt, content_id

log = logging.getLogger(__name__)

_TURN = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's marks
_VOTES = {1: 0.0, 2: 1.0, 0: 0.5}  # winner -> probability that b is better


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt.

    Attributes:
      p_b: probability in [0, 1] that `b` is the better one; 0.5 is a tie.
      margin: how much better, in the data's own unit; 1 where the data does not say.
      groups: column -> value, what the report is broken down by.
      finish_reasons: of a and b; anything but "stop": it did not end by itself.
    """

    prompt: Prompt
    a: str
    b: str
    p_b: float
    margin: float = 1.0
    groups: Mapping[str, str] = field(default_factory=dict)
    finish_reasons: tuple[str, str] = ("stop", "stop")

    @property
    def tie(self) -> bool:
        return self.p_b == 0.5

    @property
    def chosen_is_b(self) -> bool:
        """Whether `b` counts as the chosen side; of a tie, `a` does."""
        return self.p_b > 0.5


@dataclass(frozen=True)
class PairReport:
    """What happened to a source's rows.

    Attributes:
      read: rows read. kept: pairs returned, after `limit`. ties: of those, with a label of 1/2. prompts: different
        ones.
      no_prompt, empty, identical, no_label: left out, because the prompt has no text, a response has none, both
        responses are the same text, or the label is missing.
      different_prompts: left out: the two dialogues differ before their last turn.
      no_response: left out: a dialogue does not end with the assistant's turn.
    """

    read: int
    kept: int
    ties: int
    prompts: int
    no_prompt: int = 0
    empty: int = 0
    identical: int = 0
    no_label: int = 0
    different_prompts: int = 0
    no_response: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @property
    def dropped(self) -> dict[str, int]:
        """Why rows were left out, and how many, where any were."""
        counted = ("read", "kept", "ties", "prompts")
        return {name: n for name, n in asdict(self).items() if n and name not in counted}


class Pairs(list[Pair]):
    """A list of pairs that knows what was left out."""

    def __init__(self, pairs: Iterable[Pair], report: PairReport):
        super().__init__(pairs)
        self.report = report


# ---- reading ---------------------------------------------------------------------------------------------------


def load_pairs(source: PairSource, root: str | None = None, seed: int = 0) -> Pairs:
    """Reads a file of compared responses.

    Pairs that cannot teach anything (no prompt, an empty response, two identical ones, no label) are left out and
    counted. The order depends on the seed and on the content alone; a larger `limit` takes the same pairs and more.

    Args:
      root: put before a relative `source.path`.

    Raises:
      DataError: a file or column is missing, a row is malformed, or nothing is left; says where and what to do.
    """
    read = 0
    dropped: Counter[str] = Counter()
    pairs = []
    for place, row in read_source(_as_prompts(source), root):
        read += 1
        made = _to_pair(place, row, source)
        if isinstance(made, str):
            dropped[made] += 1
        else:
            pairs.append(made)
    if not pairs:
        raise DataError(
            f"{source.path}: no pair in it can be used ({read} rows read; left out: {dict(dropped) or 'none'}). Check "
            "the file and the columns that `prompt`, `a`, `b` and `label` name."
        )
    kept = _select(pairs, source.limit, seed)
    if dropped:
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items())
        log.warning("%s: of %d rows, left out: %s", source.path, read, reasons)
    return Pairs(kept, report_of(kept, read, dropped))


def report_of(pairs: Sequence[Pair], read: int, dropped: Mapping[str, int]) -> PairReport:
    """The report of pairs that are left of `read` rows."""
    prompts = len({pair.prompt.id for pair in pairs})
    return PairReport(read, len(pairs), sum(pair.tie for pair in pairs), prompts, **dropped)


def from_preferences(preferences: Iterable[Preference]) -> Pairs:
    """A critic's preferences as pairs, `a` being the chosen response; identical and empty texts are left out."""
    pairs, dropped = [], Counter[str]()
    for row in preferences:
        reason = _unusable(row.chosen.text, row.rejected.text)
        if reason:
            dropped[reason] += 1
            continue
        reasons = (row.chosen.finish_reason, row.rejected.finish_reason)
        pairs.append(
            Pair(row.prompt, row.chosen.text, row.rejected.text, 1.0 - row.p_chosen, finish_reasons=reasons)
        )
    return Pairs(pairs, report_of(pairs, len(pairs) + dropped.total(), dropped))


def _as_prompts(source: PairSource) -> PromptSource:
    """What the readers take: they read rows, whatever is in them."""
    return PromptSource(kind=source.kind, path=source.path, split=source.split)


def _select(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """One pair of each prompt, then a second of each, and so on; prompts, and a prompt's pairs, in an order that hashes
    of their content and the seed give."""
    by_prompt: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        by_prompt[pair.prompt.id].append((content_id([seed, pair.a, pair.b, pair.p_b]), number))
    places = []
    for prompt_id, members in by_prompt.items():
        place = content_id([seed, prompt_id])
        places += [(rank, place, number) for rank, (_, number) in enumerate(sorted(members))]
    return [pairs[number] for *_, number in sorted(places)[:limit]]


# ---- one row ---------------------------------------------------------------------------------------------------


def _to_pair(place: str, row: Mapping[str, Any], source: PairSource) -> Pair | str:
    """The row's pair, or the name of the report's field that counts why it is none."""
    sides = [read_column(place, row, column, option) for column, option in ((source.a, "a"), (source.b, "b"))]
    if source.prompt is None:
        parts = [
            _dialogue(place, column, value) for column, value in zip((source.a, source.b), sides, strict=True)
        ]
        if any(part is None for part in parts):
            return "no_response"
        (messages, a), (other, b) = (part for part in parts if part is not None)
        if messages != other:
            return "different_prompts"
    else:
        messages = _prompt(place, source.prompt, read_column(place, row, source.prompt, "prompt"))
        a, b = (
            _response(place, column, value) for column, value in zip((source.a, source.b), sides, strict=True)
        )
    if not any(message.role == "user" and message.content.strip() for message in messages):
        return "no_prompt"
    if reason := _unusable(a, b):
        return reason
    p_b = 0.0 if source.label is None else _label(place, row, source)
    if p_b is None:
        return "no_label"
    margin = 1.0
    if source.margin:
        margin = _number(place, source.margin, read_column(place, row, source.margin, "margin"))
    groups = {name: str(read_column(place, row, name, "group")) for name in source.group}
    prompt = Prompt(messages=tuple(messages), source=source.path, split=source.split)
    return Pair(prompt, a, b, p_b, margin, groups)


def _unusable(a: str, b: str) -> str | None:
    if not a.strip() or not b.strip():
        return "empty"
    return "identical" if a.strip() == b.strip() else None


def _prompt(place: str, column: str, value: Any) -> list[Message]:
    if value is None or isinstance(value, str):
        return [Message(role="user", content=value or "")]
    return read_messages(place, column, value)


def _response(place: str, column: str, value: Any) -> str:
    """A text, or the last turn of a dialogue. Answers such as `True` or `7` are published as JSON values."""
    if isinstance(value, list):
        messages = read_messages(place, column, value)
        return messages[-1].content if messages and messages[-1].role == "assistant" else ""
    if value is None or isinstance(value, str | bool | int | float):
        return "" if value is None else str(value)
    raise DataError(f"{place}: `{column}` must be a text, found {type(value).__name__}")


def _dialogue(place: str, column: str, value: Any) -> tuple[list[Message], str] | None:
    """(the turns before the last, the assistant's last turn) of a whole dialogue; None if it ends otherwise."""
    if isinstance(value, str):
        messages = _hh_turns(place, column, value)
    elif isinstance(value, list):
        messages = read_messages(place, column, value)
    else:
        raise DataError(
            f"{place}: `{column}` must be a dialogue (`prompt: null`), found {type(value).__name__}"
        )
    if not messages or messages[-1].role != "assistant":
        return None
    return _joined(messages[:-1]), messages[-1].content


def _hh_turns(place: str, column: str, text: str) -> list[Message]:
    parts = _TURN.split("\n\n" + text.lstrip("\n"))
    if len(parts) < 3 or parts[0].strip():
        raise DataError(
            f"{place}: `{column}` is no dialogue: it must begin with a turn marked `Human:`. For a column of responses "
            "alone, name the column of the instruction in `prompt`."
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        Message.model_validate({"role": roles[name], "content": content.strip()})
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Consecutive turns of one speaker become one: chat templates ask for alternating roles."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            content = f"{joined[-1].content}\n\n{message.content}".strip()
            joined[-1] = Message(role=message.role, content=content)
        else:
            joined.append(message)
    return joined


def _label(place: str, row: Mapping[str, Any], source: PairSource) -> float | None:
    """The probability that `b` is better; None if the row has no label."""
    column = source.label or ""
    value = read_column(place, row, column, "label")
    if value is None or value == []:
        return None
    if source.label_kind == "probability":
        p = _number(place, column, value)
        if not 0.0 <= p <= 1.0:
            raise DataError(
                f"{place}: `{column}` is {p}, no probability. `label_kind: winner` reads 1 = a, 2 = b, 0 = tie."
            )
        return p
    votes = value if isinstance(value, list) else [value]
    if any(type(vote) is not int or vote not in _VOTES for vote in votes):
        raise DataError(
            f"{place}: `{column}` is {value!r}; with `label_kind: winner` it must be 1 (a), 2 (b), 0 (tie), or a list "
            "of them."
        )
    return sum(_VOTES[vote] for vote in votes) / len(votes)


def _number(place: str, column: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value != value or abs(value) == float("inf"):
        raise DataError(f"{place}: `{column}` must be a number, found {value!r}")
    return float(value)


# ---- train and test --------------------------------------------------------------------------------------------


def split_by_prompt(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, pairs held out): all pairs of about `share` of the prompts are held out, of at least one
    where `share` is above 0, and never of all."""
    prompts = sorted(
        {pair.prompt.id for pair in pairs}, key=lambda name: content_id(["held out", seed, name])
    )
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1) if share > 0 else 0
    chosen = set(prompts[:count])
    return (
        [pair for pair in pairs if pair.prompt.id not in chosen],
        [pair for pair in pairs if pair.prompt.id in chosen],
    )


def without_prompts(pairs: Sequence[Pair], prompts: Collection[str]) -> list[Pair]:
    """The pairs whose prompt's id is not among `prompts`."""
    return [pair for pair in pairs if pair.prompt.id not in prompts]


# ---- tokens ----------------------------------------------------------------------------------------------------


def training_pairs(pairs: Iterable[Pair], spec: RewardSpec) -> list[Pair]:
    """The pairs as the loss sees them: hard labels where `soft_labels` is off, without ties where they are dropped."""
    kept = []
    for pair in pairs:
        if not spec.soft_labels and not pair.tie:
            pair = replace(pair, p_b=float(pair.chosen_is_b))
        if not (pair.tie and spec.loss == "bradley_terry" and spec.ties == "drop"):
            kept.append(pair)
    return kept


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Pair],
    template: TemplateName,
    *,
    max_length: int,
    max_prompt_length: int,
    end_of_context: int | None = None,
) -> list[EncodedPair]:
    """Tokens of both sides, the preferred one as `chosen`.

    Args:
      end_of_context: a token that every response, cut or not, ends with; `max_length` counts it.
    """
    room = max_length - (end_of_context is not None)
    encoded = []
    for pair in pairs:
        sides, reasons, p = (pair.a, pair.b), pair.finish_reasons, 1.0 - pair.p_b
        if pair.chosen_is_b:
            sides, reasons, p = sides[::-1], reasons[::-1], pair.p_b
        made = encode_pair(
            tokenizer,
            pair.prompt.messages,
            *sides,
            template,
            max_length=room,
            max_prompt_length=min(max_prompt_length, room - 1),
            p_chosen=p,
            finish_reasons=reasons,
        )
        made = replace(made, margin=pair.margin)
        if end_of_context is not None:
            made = replace(
                made,
                chosen=_closed(made.chosen, end_of_context),
                rejected=_closed(made.rejected, end_of_context),
            )
        encoded.append(made)
    return encoded


def _closed(encoded: Encoded, token: int) -> Encoded:
    return replace(encoded, tokens=[*encoded.tokens, token], loss_mask=[*encoded.loss_mask, 1])
