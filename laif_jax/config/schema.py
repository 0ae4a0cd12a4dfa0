"""The schema of a study's YAML file; every other schema can be imported from here too."""

from typing import Literal

from pydantic import Field, model_validator

from laif_jax.config.base import Fraction, Positive, Spec
from laif_jax.config.data import DataSpec, PairSource, PairsSpec, PromptSource, SymbolsSpec
from laif_jax.config.endpoints import CriticSpec, EndpointSpec, LabelingSpec, SimulatedSpec, TeacherSpec
from laif_jax.config.rl import (
    BestOfNSpec,
    IterateSpec,
    KlSpec,
    PpoSpec,
    PpoSweep,
    RejectionSpec,
    RewardSource,
    RewardSpec,
)
from laif_jax.config.training import (
    DpoSpec,
    LoraSpec,
    MeshSpec,
    ModelSpec,
    OptimizerSpec,
    PairTrainSpec,
    PreferenceLoss,
    SamplingSpec,
    ScratchSpec,
    SftSpec,
    TrainSpec,
)

__all__ = [
    "ArmSpec",
    "BestOfNSpec",
    "CompileConfig",
    "CriticSpec",
    "DataSpec",
    "DpoSpec",
    "EndpointSpec",
    "EvaluationSpec",
    "Fraction",
    "IterateSpec",
    "KlSpec",
    "LabelingSpec",
    "LoraSpec",
    "MatrixSpec",
    "MeshSpec",
    "ModelSpec",
    "OptimizerSpec",
    "PairSource",
    "PairTrainSpec",
    "PairsSpec",
    "Positive",
    "PpoConfig",
    "PpoSpec",
    "PpoSweep",
    "PreferenceLoss",
    "PretrainSpec",
    "PromptSource",
    "QuestionSpec",
    "RejectionSpec",
    "RewardConfig",
    "RewardSource",
    "RewardSpec",
    "RunConfig",
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

# ---- study -----------------------------------------------------------------------------------------------------


class PretrainSpec(TrainSpec):
    """Pretraining of a scratch model in the synthetic world, to a chosen base strength: `examples` instruction
    documents, each step of which was carried out correctly with probability `skill`."""

    examples: Positive = 20000
    skill: Fraction = 0.5


Learned = Literal["dpo", "ppo", "iterated_dpo", "iterated_ppo", "best_of_n", "rejection_sampling"]
Optimize = Literal["none", "dpo", "ppo", "iterated_dpo", "iterated_ppo", "best_of_n", "rejection_sampling"]


class ArmSpec(Spec):
    """One arm of the LAIF matrix: SFT on `share` of a teacher's completions, then perhaps learning from a critic's
    preferences on the rest of the prompts.

    Attributes:
      optimize: "dpo"; "ppo": a reward model on the critic's labels, then the algorithm of the section `ppo`;
        "iterated_dpo" / "iterated_ppo": rounds of sampling, labelling and training (the section `iterate`);
        "best_of_n": the SFT policy, of whose samples the reward model takes the best; "rejection_sampling": SFT on its
        own best samples.
      pairs: "policy_vs_policy": two samples of the SFT policy; "policy_vs_teacher": a sample against the teacher.
      reward: of "ppo": "model": a reward model on the critic's labels; "critic": the critic rates every sample itself
        (d-RLAIF), which asks for a critic data file with ratings.
    """

    name: str
    teacher: str
    share: float = Field(gt=0.0, le=1.0)
    optimize: Optimize = "none"
    critic: str | None = None
    pairs: Literal["policy_vs_policy", "policy_vs_teacher"] = "policy_vs_policy"
    reward: Literal["model", "critic"] = "model"

    @model_validator(mode="after")
    def _check(self) -> "ArmSpec":
        if self.optimize != "none" and self.critic is None:
            raise ValueError(f"arm `{self.name}`: `optimize: {self.optimize}` needs a `critic`")
        if self.optimize != "none" and self.share >= 1.0:
            raise ValueError(f"arm `{self.name}`: `share: 1.0` leaves no prompts for preferences")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        unused = {}
        if self.optimize == "none":
            unused = dict.fromkeys(("critic", "pairs"), ("`optimize: none`", "`optimize: dpo` and others"))
        if self.optimize == "ppo" and self.reward == "critic":
            unused["pairs"] = ("`reward: critic`", "`reward: model`")
        if self.optimize != "ppo":
            unused["reward"] = (f"`optimize: {self.optimize}`", "`optimize: ppo`")
        return unused


class MatrixSpec(Spec):
    """Arms as a product: SFT on each teacher and share, and LAIF for each teacher, critic and pair source, started
    from the smallest share."""

    teachers: tuple[str, ...]
    shares: tuple[float, ...] = (0.1, 1.0)
    critics: tuple[str, ...] = ()
    pairs: tuple[Literal["policy_vs_policy", "policy_vs_teacher"], ...] = ("policy_vs_policy",)
    optimize: tuple[Learned, ...] = ("dpo",)

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


class RunConfig(Spec):
    """What every configuration file has.

    A file may also hold `scales: {NAME: {partial tree}}`; `scale: NAME` merges that tree over the file's.
    """

    name: str
    seed: int = 0
    scale: str = "default"
    out: str = "runs"
    wandb: str | None = None  # a Weights & Biases project that training metrics go to as well
    model: ModelSpec
    mesh: MeshSpec = MeshSpec()
    endpoints: dict[str, EndpointSpec] = Field(default_factory=dict)
    labeling: LabelingSpec = LabelingSpec()
    critics: dict[str, CriticSpec] = Field(default_factory=dict)


class RewardConfig(RunConfig):
    """One reward model from files of pairs: `laif reward CONFIG`. It starts from `model.source`."""

    pairs: PairsSpec
    reward: RewardSpec


class PpoConfig(RunConfig):
    """Reinforcement learning of one policy against given rewards: `laif ppo CONFIG`. The policy starts from
    `model.source`, which is also the reference; `rewards` are summed by their weights."""

    data: DataSpec
    rewards: dict[str, RewardSource] = Field(min_length=1)
    ppo: PpoSpec


class StudyConfig(RunConfig):
    """One study, one YAML file."""

    seeds: Positive = 1  # replicates; replicate i uses seed + i
    data: DataSpec
    teachers: dict[str, TeacherSpec]
    pretrain: PretrainSpec | None = None
    sft: SftSpec
    sampling: SamplingSpec = SamplingSpec(top_p=0.9)
    dpo: DpoSpec | None = None
    reward: RewardSpec | None = None
    ppo: PpoSpec | None = None
    best_of_n: BestOfNSpec | None = None
    rejection_sampling: RejectionSpec | None = None
    iterate: IterateSpec | None = None
    evaluation: EvaluationSpec
    arms: tuple[ArmSpec, ...] = ()
    matrix: MatrixSpec | None = None
    questions: tuple[QuestionSpec, ...] = ()


class CompileConfig(RunConfig):
    """Shapes of steps alone, without data: `laif compile CONFIG`, which also takes every other kind of file."""

    sft: SftSpec | None = None
    dpo: DpoSpec | None = None
    reward: RewardSpec | None = None
    ppo: PpoSpec | None = None
    sampling: SamplingSpec | None = None
