"""Schemas of where prompts and pairs come from."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from laif_jax.config.base import Positive, Spec

# ---- prompts ---------------------------------------------------------------------------------------------------


class PromptSource(Spec):
    """Where prompts come from.

    Attributes:
      kind: "jsonl" / "parquet" / "arrayrecord" (files at `path`), "hf" (`datasets`: a Hub name or a saved folder),
        "tfds" (a `data_source` of TensorFlow Datasets) or "symbols" (the synthetic world, made on the fly).
      prompt: the column that holds the instruction (or a list of messages). completions: the column that maps a
        generator's name to its completion, or None. limit: rows taken from the start, after shuffling with the seed.
    """

    kind: Literal["jsonl", "parquet", "arrayrecord", "hf", "tfds", "symbols"] = "jsonl"
    path: str | None = None
    split: str = "train"
    prompt: str = "prompt"
    completions: str | None = None
    limit: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> "PromptSource":
        if self.kind == "symbols" and self.limit is None:
            raise ValueError("`kind: symbols` needs `limit`, the number of prompts to make")
        if self.kind != "symbols" and self.path is None:
            raise ValueError(f"`kind: {self.kind}` needs `path`")
        if self.kind in ("jsonl", "parquet", "arrayrecord") and self.split != "train":
            raise ValueError(
                f"`split` has no effect with `kind: {self.kind}`; name the split's file in `path`"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.kind != "symbols":
            return {}
        return dict.fromkeys(
            ("path", "prompt", "completions"), ("`kind: symbols`", "the kinds that read files")
        )


class SymbolsSpec(Spec):
    """The synthetic world: instructions over short symbol strings."""

    symbols: Annotated[int, Field(ge=3, le=26)] = 8
    min_length: Positive = 3
    max_length: Positive = 6
    max_steps: Positive = 2  # how many operations an instruction composes


class DataSpec(Spec):
    """Prompts for training and for evaluation. `root` is put before relative paths."""

    root: str | None = None
    train: PromptSource
    eval: PromptSource
    symbols: SymbolsSpec | None = None


# ---- pairs -----------------------------------------------------------------------------------------------------


class PairSource(Spec):
    """A file of compared responses, for a reward model.

    Attributes:
      kind: "jsonl" / "parquet" / "arrayrecord" (files at `path`) or "hf" (`datasets`: a Hub name or a saved folder).
      prompt: the column of the instruction (or list of messages); None: `a` and `b` hold whole dialogues, with turns
        marked by "\\n\\nHuman:" and "\\n\\nAssistant:" (HH-RLHF), of which the last assistant turn is compared.
      a, b: the columns of the two responses.
      label: the column that says which is better; None: `a` is (a file of `chosen` and `rejected`).
      label_kind: "probability": that `b` is better; "winner": 1 = a, 2 = b, 0 = tie, and a list of them is averaged.
      margin: a column with how much better it is, for `reward.margin`.
      group: columns whose values the report is broken down by, such as the opponent's name; one name or a list.
      limit: rows to take. Prompts are shuffled with the seed; one row of each is taken, then a second of each, and so
        on, so that few rows still hold many prompts.
    """

    kind: Literal["jsonl", "parquet", "arrayrecord", "hf"] = "jsonl"
    path: str
    split: str = "train"
    prompt: str | None = "prompt"
    a: str = "a"
    b: str = "b"
    label: str | None = "p_b"
    label_kind: Literal["probability", "winner"] = "probability"
    margin: str | None = None
    group: tuple[str, ...] = ()
    limit: Positive | None = None

    @field_validator("group", mode="before")
    @classmethod
    def _one_group(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "PairSource":
        if self.kind != "hf" and self.split != "train":
            raise ValueError(
                f"`split` has no effect with `kind: {self.kind}`; name the split's file in `path`"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        return {} if self.label is not None else {"label_kind": ("`label: null`", "a `label` column")}


class PairsSpec(Spec):
    """Pairs that a reward model is trained and tested on. `root` is put before relative paths; a prompt that occurs in
    a test set is dropped from training, and counted."""

    root: str | None = None
    train: PairSource
    tests: dict[str, PairSource] = Field(default_factory=dict)
