"""Files of pairs to be judged: one row per pair, with people's labels where there are any."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from laif_jax.evaluation.agreement import human_label
from laif_jax.records import Comparison, Completion, DataError, Message, Prompt, read_rows
from laif_jax.records.io import PathLike


@dataclass(frozen=True)
class LabelledPair:
    """A comparison; `human`: people's labels (1 = a, 2 = b, 0 = tie), none if there are none."""

    comparison: Comparison
    human: tuple[int, ...] = ()
    source: str = ""


def read_pairs(path: PathLike, *, limit: int | None = None, seed: int = 0) -> list[LabelledPair]:
    """Reads pairs from .jsonl(.gz), .json(.gz) or .parquet.

    A row is a `Comparison` as this package writes it, or has `prompt` (a text or a list of messages), `a` and `b`; and
    perhaps `generator_a` and `generator_b` (or `model_a` and `model_b`), `human` (a label or a list of them), `source`,
    and `quality_a` and `quality_b`, which only simulated critics see.

    Args:
      limit: a random sample of that many rows, drawn with `seed`, in the file's order; None: all.

    Raises:
      DataError: no rows, or a malformed one (named by number).
    """
    pairs = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            pairs.append(_pair(row))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: {_why(error)}") from error
    if not pairs:
        raise DataError(f"{path}: no rows")
    if limit is None or limit >= len(pairs):
        return pairs
    return [pairs[i] for i in sorted(random.Random(seed).sample(range(len(pairs)), limit))]


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"a pair needs the fields prompt, a and b; {error} is missing"
    return f"{type(error).__name__}: {error}"


def _pair(row: Mapping[str, Any]) -> LabelledPair:
    labels = row.get("human")
    human = () if labels is None else tuple(labels) if isinstance(labels, list | tuple) else (labels,)
    if human:
        human_label(human)
    if isinstance(row["a"], Mapping):
        fields = {name: row[name] for name in ("prompt", "a", "b", "id") if name in row}
        return LabelledPair(Comparison.from_row(fields), human, str(row.get("source") or ""))
    prompt = _prompt(row["prompt"])
    sides: dict[str, Completion] = {}
    for side in ("a", "b"):
        generator = row.get(f"generator_{side}") or row.get(f"model_{side}") or side
        quality = row.get(f"quality_{side}")
        sides[side] = Completion(
            prompt_id=prompt.id,
            generator=str(generator),
            text=str(row[side]),  # answers such as `True` or `7` were published as JSON booleans and numbers
            meta={} if quality is None else {"quality": float(quality)},
        )
    return LabelledPair(
        Comparison(prompt=prompt, a=sides["a"], b=sides["b"]), human, str(row.get("source") or "")
    )


def _prompt(value: Any) -> Prompt:
    if isinstance(value, list | tuple):
        return Prompt(messages=tuple(Message.model_validate(message) for message in value))
    return Prompt.from_text(str(value))
