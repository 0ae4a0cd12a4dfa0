"""Schema of `laif label run`: a file of pairs, a critic, and where the labels go."""

from typing import Literal

from pydantic import Field, model_validator

from laif_jax.config.base import Positive, Spec
from laif_jax.config.endpoints import EndpointSpec, LabelingSpec
from laif_jax.config.money import parse_money


class PairFile(Spec):
    """A file of two responses to each of many prompts: .jsonl, .jsonl.gz, .json or .parquet.

    Attributes:
      prompt, a, b: names of its columns. A prompt is a text, or a list of messages with `role` and `content`.
      label: a column that says which one is better, for a measure of agreement: the probability that `b` is, or (with
        `label_kind: winner`) 1 for a, 2 for b, 0 for a tie; of a list of votes the mean. None: the column `human`, with
        1, 2 and 0, where there is one.
      limit: rows to take, from the start.
    """

    path: str
    prompt: str = "prompt"
    a: str = "a"
    b: str = "b"
    label: str | None = None
    label_kind: Literal["probability", "winner"] = "probability"
    limit: Positive | None = None

    def unused(self) -> dict[str, tuple[str, str]]:
        return {"label_kind": ("no `label`", "`label`")} if self.label is None else {}


class StrongCritic(Spec):
    """A second, stronger critic. `below`: it is asked where the first one's |p_b - 1/2| is below this, or where that
    one gave no label."""

    endpoint: EndpointSpec
    critic: str = "laif_basic"
    order: Literal["both", "seeded"] = "both"
    below: float = Field(default=0.2, gt=0, le=0.5)


class LabelConfig(Spec):
    """Labels for a file of pairs: `laif label run CONFIG`.

    Attributes:
      labels: the .jsonl or .jsonl.gz that is written: the rows of `pairs` with `p_b` (the probability that b is
        better), `status` and more. Beside it stands `report`, a folder with the plan, what was spent, and the quality.
      critic: a shipped critic's name, or the folder of one. order: "both" orders averaged, or one "seeded" order.
      strong: another critic, for the pairs of which this one is not sure.
      budget: a hard cap on what all calls from this store may cost, as in "5USD".
    """

    pairs: PairFile
    endpoint: EndpointSpec
    critic: str = "laif_basic"
    order: Literal["both", "seeded"] = "both"
    seed: int = 0
    strong: StrongCritic | None = None
    labels: str = "labels.jsonl"
    budget: str | None = None
    labeling: LabelingSpec = Field(default_factory=LabelingSpec)

    @property
    def report(self) -> str:
        """The folder beside the labels: labels.jsonl has labels-report."""
        return f"{self.labels.removesuffix('.gz').removesuffix('.jsonl')}-report"

    @model_validator(mode="after")
    def _check(self) -> "LabelConfig":
        if not self.labels.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError("`labels` is written as JSON lines: its name must end in .jsonl or .jsonl.gz")
        if self.budget is not None and self.budget != "none":
            parse_money(self.budget)
        if self.labels == self.pairs.path:
            raise ValueError("`labels` and `pairs.path` are the same file; labels go to a file of their own")
        if self.budget is not None and self.labeling.url is not None:
            raise ValueError(
                "`budget` has no effect with `labeling.url`: set it where that service runs "
                "(`laif label budget AMOUNT --store STORE`)"
            )
        return self
