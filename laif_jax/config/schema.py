"""Typed, frozen schemas of every YAML file. An unknown key, a wrong type or an option without effect is an error."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Spec(BaseModel):
    """Base of all schemas: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def unused(self) -> dict[str, tuple[str, str]]:
        """Options without effect under the others: option -> (the choice that makes it so, what would use it)."""
        return {}

    @model_validator(mode="after")
    def _refuse_unused(self) -> Self:
        for option, (choice, user) in self.unused().items():
            if option in self.model_fields_set:
                raise ValueError(
                    f"`{option}` has no effect with {choice}; it is used by {user}. Remove it, or change the method."
                )
        return self

    def resolved(self) -> dict[str, Any]:
        """All values, defaults included, as plain JSON; options without effect are left out."""
        unused = self.unused()
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields if name not in unused}


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.resolved()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


# ---- model -----------------------------------------------------------------------------------------------------


class ScratchSpec(Spec):
    """Sizes of a decoder initialised at random (Llama architecture)."""

    hidden_size: Positive = 128
    intermediate_size: Positive = 344
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive | None = None
    max_position: Positive = 512
    tie_embeddings: bool = True


class LoraSpec(Spec):
    """Low-rank adapters (Hu et al. 2021): W + (alpha / rank) A B on the named linear layers."""

    rank: Positive = 16
    alpha: float = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )


class ModelSpec(Spec):
    """The base model.

    Attributes:
      source: "scratch", a folder in Hugging Face layout, a `.gguf` file, a name that `laif fetch` knows, or a Hub id.
      tokenizer: where the tokenizer comes from; None: the model's own. "symbols": the synthetic world's.
      template: "model": the tokenizer's own chat template; "human_assistant": the paper's plain template.
      dtype: of compute; the weights that the optimiser sees are always float32.
      save_dtype: of the weights that a stage writes for the next one and for you.
      remat: what the backward pass recomputes: "none", "full" (whole blocks) or "dots" (all but matrix products).
      logprob_chunk: tokens per chunk of the vocabulary log-probs.
    """

    source: str = "scratch"
    scratch: ScratchSpec | None = None
    tokenizer: str | None = None
    template: Literal["model", "human_assistant"] = "model"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "full", "dots"] = "full"
    logprob_chunk: Positive = 1024
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> "ModelSpec":
        if self.source == "scratch":
            if self.scratch is None:
                raise ValueError("`source: scratch` needs the sizes under `scratch:`")
            if self.tokenizer is None:
                raise ValueError("`source: scratch` needs a `tokenizer`")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.source == "scratch":
            return {}
        return {"scratch": (f"`source: {self.source}`", "`source: scratch`")}


class MeshSpec(Spec):
    """Devices per mesh axis; -1 (one axis at most) takes what is left. Axis order: data, fsdp, tensor."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    axis_type: Literal["auto", "explicit"] = "auto"


# ---- training --------------------------------------------------------------------------------------------------


class OptimizerSpec(Spec):
    """Optimiser and learning-rate schedule.

    Attributes:
      warmup: optimiser steps of linear warm-up from 0. clip_norm: global gradient norm; None: no clipping.
      momentum, decay: of RMSprop (`decay` is torch's alpha, 0.99 in the paper).
    """

    name: Literal["adamw", "rmsprop", "adafactor", "lion"] = "adamw"
    learning_rate: float = Field(default=1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: float = Field(default=1e-8, gt=0)
    decay: Fraction = 0.99
    momentum: Fraction = 0.0
    clip_norm: float | None = Field(default=1.0, gt=0)

    def unused(self) -> dict[str, tuple[str, str]]:
        uses = {
            "b1": ("adamw", "lion"),
            "b2": ("adamw", "lion"),
            "eps": ("adamw", "rmsprop"),
            "decay": ("rmsprop",),
            "momentum": ("rmsprop",),
            "weight_decay": ("adamw", "adafactor", "lion"),
        }
        choice = f"`name: {self.name}`"
        return {key: (choice, " and ".join(names)) for key, names in uses.items() if self.name not in names}


class TrainSpec(Spec):
    """What every training stage shares.

    Attributes:
      epochs / steps: give one; an optimiser step is one update.
      batch_size: sequences (SFT) or pairs (preferences) per update, over all devices. With packing, the rows.
      micro_batch: sequences, pairs or rows per forward pass; None: the whole batch at once.
      max_length: tokens of prompt and response; max_prompt_length: of the prompt alone, when truncation is needed.
      save_every: optimiser steps between checkpoints; 0: only what resuming needs at the end.
    """

    optimizer: OptimizerSpec = OptimizerSpec()
    epochs: Positive | None = None
    steps: Positive | None = None
    batch_size: Positive = 8
    micro_batch: Positive | None = None
    max_length: Positive = 512
    max_prompt_length: Positive = 256
    packing: bool = False
    log_every: Positive = 10
    save_every: int = Field(default=200, ge=0)
    keep: Positive = 2

    @model_validator(mode="after")
    def _check_train(self) -> "TrainSpec":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of `epochs` and `steps`")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not a multiple of `micro_batch` {self.micro_batch}"
            )
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"`max_prompt_length` {self.max_prompt_length} leaves no room in `max_length` {self.max_length}"
            )
        return self


class SftSpec(TrainSpec):
    """Supervised fine-tuning. `reduction`: "token": mean over supervised tokens; "sequence": the paper's, the sum
    over a sequence's tokens, mean over sequences."""

    reduction: Literal["token", "sequence"] = "token"


PreferenceLoss = Literal[
    "sigmoid", "conservative", "robust", "ipo", "ipo_averaged", "hinge", "simpo", "length_normalised"
]


class DpoSpec(TrainSpec):
    """Preference optimisation without a reward model (DPO and its family).

    Attributes:
      loss: the objective; see `laif_jax.objectives.preference`.
      beta: inverse temperature of the implicit reward.
      label_smoothing: probability that a label is flipped (conservative, robust).
      gamma: target margin (simpo).
      reference_free: the reference's log-probs count as 0.
      sft_weight: weight of an added negative log-likelihood of the chosen response, per token.
      soft_labels: use `p_chosen` as it is; False: round it to 1 (hard labels).
    """

    loss: PreferenceLoss = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    gamma: float = Field(default=0.5, ge=0)
    reference_free: bool = False
    sft_weight: float = Field(default=0.0, ge=0)
    soft_labels: bool = True

    @model_validator(mode="after")
    def _check_dpo(self) -> "DpoSpec":
        if self.loss in ("conservative", "robust") and self.label_smoothing == 0.0:
            raise ValueError(f"`loss: {self.loss}` needs `label_smoothing` > 0; without it, it is `sigmoid`")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        uses = {"label_smoothing": ("conservative", "robust"), "gamma": ("simpo",)}
        choice = f"`loss: {self.loss}`"
        unused = {key: (choice, " and ".join(names)) for key, names in uses.items() if self.loss not in names}
        if self.loss == "simpo":
            unused["reference_free"] = (choice, "the losses that have a reference")
        return unused


class SamplingSpec(Spec):
    """How text is generated. `temperature: 0` is greedy; `top_k: 0` and `top_p: 1` are off.

    `batch_size`: prompts decoded together; `samples`: completions per prompt.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: Positive = 256
    samples: Positive = 1
    batch_size: Positive = 32

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.temperature > 0:
            return {}
        return dict.fromkeys(("top_p", "top_k"), ("`temperature: 0` (greedy)", "a temperature above 0"))


# ---- labelling -------------------------------------------------------------------------------------------------


class SimulatedSpec(Spec):
    """A simulated endpoint with planted truth.

    Attributes:
      world: whose notion of quality is the truth: "symbols" (computed by program) or "planted" (read from each
        completion's `meta.quality`).
      skill: of a teacher: probability that each step of an instruction is carried out correctly.
      accuracy: of a critic: probability that it names the better response when the two differ.
      sharpness: of a critic that gives log-probs: how far its probability is from 1/2 (logit of its verdict).
      tie_rate, position_bias (logit towards the first shown), length_bias (logit per unit of relative length).
      failure_rate, rate_limit_rate, refusal_rate, garbage_rate, empty_rate: chances of that misbehaviour per attempt.
      latency: seconds per call.
    """

    world: Literal["symbols", "planted"] = "symbols"
    skill: Fraction = 1.0
    accuracy: Fraction = 1.0
    sharpness: float = Field(default=4.0, gt=0)
    tie_rate: Fraction = 0.0
    position_bias: float = 0.0
    length_bias: float = 0.0
    failure_rate: Fraction = 0.0
    rate_limit_rate: Fraction = 0.0
    refusal_rate: Fraction = 0.0
    garbage_rate: Fraction = 0.0
    empty_rate: Fraction = 0.0
    latency: float = Field(default=0.0, ge=0)
    seed: int = 0


class EndpointSpec(Spec):
    """A model that answers requests: a teacher, a critic or a judge.

    Attributes:
      provider: "openai": any OpenAI-compatible endpoint at `base_url`; "simulated": planted truth; "llama_cpp": a
        llama.cpp server over the local file `gguf`, started and stopped by `laif run`; "checkpoint": our own model
        server over the folder `checkpoint`, likewise.
      api_key_env: the *name* of the environment variable that holds the key; keys are never written in a config.
      concurrency: calls in flight at most. timeout: seconds per call. max_attempts: tries per call.
    """

    provider: Literal["openai", "simulated", "llama_cpp", "checkpoint"]
    model: str = "default"
    base_url: str | None = None
    api_key_env: str | None = None
    gguf: str | None = None
    checkpoint: str | None = None
    simulated: SimulatedSpec | None = None
    context_length: Positive = 2048
    concurrency: Positive = 8
    timeout: float = Field(default=120.0, gt=0)
    max_attempts: Positive = 6

    @model_validator(mode="after")
    def _check(self) -> "EndpointSpec":
        needs = {
            "openai": "base_url",
            "simulated": "simulated",
            "llama_cpp": "gguf",
            "checkpoint": "checkpoint",
        }
        if getattr(self, needs[self.provider]) is None:
            raise ValueError(f"`provider: {self.provider}` needs `{needs[self.provider]}`")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        users = {
            "base_url": ("openai",),
            "api_key_env": ("openai",),
            "simulated": ("simulated",),
            "gguf": ("llama_cpp",),
            "checkpoint": ("checkpoint",),
            "context_length": ("llama_cpp",),
        }
        choice = f"`provider: {self.provider}`"
        return {
            option: (choice, f"`provider: {names[0]}`")
            for option, names in users.items()
            if self.provider not in names
        }


class TeacherSpec(Spec):
    """Who writes the completions of supervised fine-tuning: give `endpoint`, or `completions`, the name of a column
    of completions that the data already holds."""

    endpoint: str | None = None
    completions: str | None = None
    system: str | None = None
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: Positive = 512

    @model_validator(mode="after")
    def _check(self) -> "TeacherSpec":
        if (self.endpoint is None) == (self.completions is None):
            raise ValueError(
                "give one of `endpoint` (a model to ask) and `completions` (a column of the data)"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.completions is None:
            return {}
        return dict.fromkeys(("system", "temperature", "max_tokens"), ("`completions`", "`endpoint`"))


class CriticSpec(Spec):
    """Who compares two responses. `critic`: the name of a critic data file (prompt, parser, options), or a path.
    `order`: "both" orders averaged, or one "seeded" order per comparison."""

    endpoint: str
    critic: str = "laif_basic"
    order: Literal["both", "seeded"] = "both"


class LabelingSpec(Spec):
    """The labelling service. `url`: None: `laif run` starts one for the study, with its store at `store`."""

    url: str | None = None
    store: str | None = None
    poll: float = Field(default=0.2, gt=0)
    min_coverage: Fraction = 0.9

    def unused(self) -> dict[str, tuple[str, str]]:
        return {} if self.url is None else {"store": ("`url`", "a service that `laif run` starts")}


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
