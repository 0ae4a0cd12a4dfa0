"""The schema of a study's YAML file; every other schema can be imported from here too."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from laif_jax.config.base import Fraction, Positive, Spec
from laif_jax.config.endpoints import CriticSpec, EndpointSpec, LabelingSpec, SimulatedSpec, TeacherSpec
from laif_jax.config.training import (
    DpoSpec,
    LoraSpec,
    MeshSpec,
    ModelSpec,
    OptimizerSpec,
    PreferenceLoss,
    SamplingSpec,
    ScratchSpec,
    SftSpec,
    TrainSpec,
)

__all__ = [
    "ArmSpec",
    "CriticSpec",
    "DataSpec",
    "DpoSpec",
    "EndpointSpec",
    "EvaluationSpec",
    "Fraction",
    "LabelingSpec",
    "LoraSpec",
    "MatrixSpec",
    "MeshSpec",
    "ModelSpec",
    "OptimizerSpec",
    "Positive",
    "PreferenceLoss",
    "PretrainSpec",
    "PromptSource",
    "QuestionSpec",
    "SamplingSpec",
    "ScratchSpec",
    "SftSpec",
    "SimulatedSpec",
    "Spec",
    "StudyConfig",
    "SymbolsSpec",
    "TeacherSpec",
    "TrainSpec",
]

# ---- data ------------------------------------------------------------------------------------------------------


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


# ---- study -----------------------------------------------------------------------------------------------------


class PretrainSpec(TrainSpec):
    """Pretraining of a scratch model in the synthetic world, to a chosen base strength: `examples` instruction
    documents, each step of which was carried out correctly with probability `skill`."""

    examples: Positive = 20000
    skill: Fraction = 0.5


class ArmSpec(Spec):
    """One arm of the LAIF matrix: SFT on `share` of a teacher's completions, then perhaps preference optimisation on
    the rest of the prompts.

    Attributes:
      pairs: "policy_vs_policy": two samples of the SFT policy; "policy_vs_teacher": a sample against the teacher.
    """

    name: str
    teacher: str
    share: float = Field(gt=0.0, le=1.0)
    optimize: Literal["none", "dpo"] = "none"
    critic: str | None = None
    pairs: Literal["policy_vs_policy", "policy_vs_teacher"] = "policy_vs_policy"

    @model_validator(mode="after")
    def _check(self) -> "ArmSpec":
        if self.optimize != "none" and self.critic is None:
            raise ValueError(f"arm `{self.name}`: `optimize: {self.optimize}` needs a `critic`")
        if self.optimize != "none" and self.share >= 1.0:
            raise ValueError(f"arm `{self.name}`: `share: 1.0` leaves no prompts for preferences")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.optimize != "none":
            return {}
        return dict.fromkeys(("critic", "pairs"), ("`optimize: none`", "`optimize: dpo`"))


class MatrixSpec(Spec):
    """Arms as a product: SFT on each teacher and share, and LAIF for each teacher, critic and pair source, started
    from the smallest share."""

    teachers: tuple[str, ...]
    shares: tuple[float, ...] = (0.1, 1.0)
    critics: tuple[str, ...] = ()
    pairs: tuple[Literal["policy_vs_policy", "policy_vs_teacher"], ...] = ("policy_vs_policy",)
    optimize: tuple[Literal["dpo"], ...] = ("dpo",)

    def unused(self) -> dict[str, tuple[str, str]]:
        return {} if self.critics else dict.fromkeys(("pairs", "optimize"), ("no `critics`", "`critics`"))


class QuestionSpec(Spec):
    """The two arms that the study's question compares: "is LAIF better than SFT on the strong teacher here?" """

    laif: str
    sft: str


class EvaluationSpec(Spec):
    """How arms are compared: each arm's completions against the reference completions, by the judge.

    Attributes:
      reference: the name of the teacher whose completions every arm is compared with.
      agreement: a JSONL file with human labels on which the judge's own agreement is measured; relative to `data.root`.
    """

    judge: CriticSpec
    reference: str
    sampling: SamplingSpec = SamplingSpec(temperature=0.7, top_p=0.9)
    bootstrap: Positive = 2000
    agreement: str | None = None
    agreement_limit: Positive | None = None

    def unused(self) -> dict[str, tuple[str, str]]:
        return {} if self.agreement else {"agreement_limit": ("no `agreement` file", "`agreement`")}


class StudyConfig(Spec):
    """One study, one YAML file.

    A file may also hold `scales: {NAME: {partial tree}}`; `scale: NAME` merges that tree over the file's.
    """

    name: str
    seed: int = 0
    seeds: Positive = 1  # replicates; replicate i uses seed + i
    scale: str = "default"
    out: str = "runs"
    wandb: str | None = None  # a Weights & Biases project that training metrics go to as well
    model: ModelSpec
    mesh: MeshSpec = MeshSpec()
    data: DataSpec
    endpoints: dict[str, EndpointSpec] = Field(default_factory=dict)
    labeling: LabelingSpec = LabelingSpec()
    teachers: dict[str, TeacherSpec]
    critics: dict[str, CriticSpec] = Field(default_factory=dict)
    pretrain: PretrainSpec | None = None
    sft: SftSpec
    sampling: SamplingSpec = SamplingSpec(top_p=0.9)
    dpo: DpoSpec | None = None
    evaluation: EvaluationSpec
    arms: tuple[ArmSpec, ...] = ()
    matrix: MatrixSpec | None = None
    questions: tuple[QuestionSpec, ...] = ()
