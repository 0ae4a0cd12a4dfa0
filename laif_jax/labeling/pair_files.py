"""Files of pairs to be judged: one row per pair, with labels where there are any. The one reader of such files."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from pydantic import ValidationError

from laif_jax.config.label import PairFile
from laif_jax.evaluation.agreement import human_label
from laif_jax.records import Comparison, Completion, DataError, Message, Prompt, read_rows
from laif_jax.records.io import PathLike, read_jsonl_numbered

HUMAN = "human"  # the column of labels that is read where no other one is named
_VOTES = {1: 0.0, 2: 1.0, 0: 0.5}


@dataclass(frozen=True)
class LabelledPair:
    """A comparison and what its row says of it.

    Attributes:
      human: labels (1 = a, 2 = b, 0 = tie), none if there are none. source: where the pair is from.
      p_b: the mean of the labels as the probability that b is better; None without labels.
      row: as it stands in the file.
    """

    comparison: Comparison
    human: tuple[int, ...] = ()
    source: str = ""
    p_b: float | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_pairs(
    file: PathLike | PairFile, *, limit: int | None = None, seed: int = 0, labels: bool = True
) -> list[LabelledPair]:
    """Reads pairs from .jsonl(.gz), .json(.gz) or .parquet.

    A row is a `Comparison` as this package writes it; or has a prompt (a text, or a list of messages with `role` and
    `content`) and two texts, in the columns `prompt`, `a` and `b` or in those that `file` names. It may have

    * a label: `human` (1, 2 or 0, or a list of them), or the column that `file` names, of the kind that it names;
    * the names of who wrote the texts: `generator_a` or `model_a`, and likewise of b. Of texts in columns such as
      `output_1` and `output_2` it is `generator_1` or `model_1`;
    * `quality_a` and `quality_b`, which only simulated critics see; and `source`.

    Args:
      file: a path, or a path with the names of its columns.
      limit: a random sample of that many rows, drawn with `seed`, in the file's order; None: all. (`PairFile.limit`
        takes rows from the start.)
      labels: False: labels are not read, so none can be wrong.

    Raises:
      DataError: no rows, or a malformed one: the message has the file, the line (in a list or table: the row), what is
        wrong and what to do.
    """
    spec = file if isinstance(file, PairFile) else PairFile(path=str(file))
    pairs = []
    for where, row in _numbered(spec.path):
        if spec.limit is not None and len(pairs) == spec.limit:
            break
        pairs.append(_Reader(spec, f"{spec.path}, {where}", labels).pair(row))
    if not pairs:
        raise DataError(
            f"{spec.path}: no rows. A file of pairs has one row per pair, with a prompt and two texts"
        )
    if labels and spec.label is not None and not any(spec.label in pair.row for pair in pairs):
        raise DataError(
            f"{spec.path}: `pairs.label` names the column {spec.label}, which no row has; there are "
            f"{', '.join(map(str, pairs[0].row))}. Name one of them, or remove `label`"
        )
    if limit is None or limit >= len(pairs):
        return pairs
    return [pairs[i] for i in sorted(random.Random(seed).sample(range(len(pairs)), limit))]


def _numbered(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, each with what it is called in messages: its line in a file of lines."""
    name = epath.Path(path).name.removesuffix(".gz")
    if name.endswith((".parquet", ".json")):
        yield from ((f"row {number}", row) for number, row in enumerate(read_rows(path), 1))
    else:
        yield from ((f"line {number}", row) for number, row in read_jsonl_numbered(path))


@dataclass(frozen=True)
class _Reader:
    """Reads one row. `where`: the file and the line, for messages."""

    spec: PairFile
    where: str
    labels: bool

    def pair(self, row: Mapping[str, Any]) -> LabelledPair:
        spec = self.spec
        if missing := [name for name in (spec.prompt, spec.a, spec.b) if name not in row]:
            raise DataError(
                f"{self.where}: no column {', '.join(missing)}; there are {', '.join(map(str, row))}. Rename them to "
                "prompt, a and b, or name yours in `pairs.prompt`, `pairs.a` and `pairs.b` of a configuration"
            )
        votes = self._votes(row) if self.labels else ()
        return LabelledPair(
            self._whole(row) if isinstance(row[spec.a], Mapping) else self._comparison(row),
            human=tuple(0 if vote == 0.5 else 1 + (vote > 0.5) for vote in votes),
            source=str(row.get("source") or ""),
            p_b=sum(votes) / len(votes) if votes else None,
            row=row,
        )

    def _whole(self, row: Mapping[str, Any]) -> Comparison:
        fields = {"prompt": row[self.spec.prompt], "a": row[self.spec.a], "b": row[self.spec.b]}
        if "id" in row:
            fields["id"] = row["id"]
        try:
            return Comparison.from_row(fields)
        except ValidationError as error:
            raise DataError(
                f"{self.where}: no comparison as this package writes them: {_first(error)}. Mend the row, or give the "
                "two texts as texts"
            ) from error

    def _comparison(self, row: Mapping[str, Any]) -> Comparison:
        prompt = self._prompt(row[self.spec.prompt])
        generators = self._generators(row)
        sides: dict[str, Completion] = {}
        for side, column in (("a", self.spec.a), ("b", self.spec.b)):
            quality = row.get(f"quality_{side}")
            try:
                meta = {} if quality is None else {"quality": float(quality)}
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{self.where}: quality_{side} is {quality!r}; give a number from 0 to 1, or remove the column"
                ) from error
            sides[side] = Completion(
                prompt_id=prompt.id,
                generator=generators[side],
                text=self._text(column, row[column]),
                meta=meta,
            )
        return Comparison(prompt=prompt, a=sides["a"], b=sides["b"])

    def _text(self, column: str, value: Any) -> str:
        # Answers such as `True` or `7` were published as JSON booleans and numbers.
        if value is None or isinstance(value, Mapping | list | tuple):
            shown = "null" if value is None else f"a {type(value).__name__}"
            raise DataError(f"{self.where}: {column} is {shown}, not a text. Mend the row, or leave it out")
        return str(value)

    def _prompt(self, value: Any) -> Prompt:
        try:
            if not isinstance(value, list | tuple):
                return Prompt.from_text(self._text(self.spec.prompt, value))
            # Other fields of a message, such as the name of who wrote it, are not shown to a critic.
            turns = (Message(role=turn["role"], content=turn["content"]) for turn in value)
            return Prompt(messages=tuple(turns))
        except (KeyError, TypeError, ValidationError) as error:
            why = _first(error) if isinstance(error, ValidationError) else f"{type(error).__name__} {error}"
            raise DataError(
                f"{self.where}: {self.spec.prompt} is no prompt ({why}). Give a text, or a list of messages with "
                "`role` (system, user or assistant) and `content`, at least one of a user"
            ) from error

    def _generators(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Who wrote the sides; "a" and "b" where nobody is named."""
        names = {"a": ["a"], "b": ["b"]}
        ends = {side: column.rpartition("_")[2] for side, column in (("a", self.spec.a), ("b", self.spec.b))}
        if ends["a"] != ends["b"]:
            names = {side: [side, ends[side]] for side in names}
        found = {}
        for side, suffixes in names.items():
            columns = [f"{kind}_{suffix}" for suffix in suffixes for kind in ("generator", "model")]
            found[side] = str(next((row[column] for column in columns if row.get(column)), side))
        return found

    def _votes(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """Each label as the probability that b is better."""
        column, winner = self.spec.label or HUMAN, self.spec.label is None or self.spec.label_kind == "winner"
        value = row.get(column)
        if value is None or value == []:
            return ()
        votes: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        try:
            if winner:
                human_label(tuple(votes))
                return tuple(_VOTES[vote] for vote in votes)
            found = tuple(float(vote) for vote in votes)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.where}: {column} is {value!r}. {_KINDS[winner]}") from error
        if any(not 0.0 <= vote <= 1.0 for vote in found):
            raise DataError(f"{self.where}: {column} is {value!r}. {_KINDS[winner]}")
        return found


_KINDS = {
    True: "Labels are 1 (a is better), 2 (b is better) or 0 (a tie), or a list of them; null where there is none",
    False: "A label is the probability that b is better, from 0 to 1, or a list of them; for labels 1, 2 and 0 give "
    "`pairs.label_kind: winner`",
}


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}".removeprefix(": ")
