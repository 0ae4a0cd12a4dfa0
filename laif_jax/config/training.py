"""Schemas of the model, the mesh, training and sampling."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from laif_jax.config.base import Fraction, Positive, Spec

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
      save_dtype: of the weights that a stage writes for the next one and for you. bfloat16 halves the files, and rounds
        away updates smaller than about 1/500 of a weight: a short preference optimisation can vanish in it.
      remat: what the backward pass recomputes: "none", "full" (whole blocks) or "dots" (all but matrix products).
      logprob_chunk: tokens whose logits over the whole vocabulary exist at a time. On a CPU with "dots", and so few
        that their logits (4 bytes each) fit into its cache, a step of a real model is fastest.
      router_loss: weight of the load-balancing loss of a mixture of experts; None: the model's own
        (`router_aux_loss_coef`); 0: none.
    """

    source: str = "scratch"
    scratch: ScratchSpec | None = None
    tokenizer: str | None = None
    template: Literal["model", "human_assistant"] = "model"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "full"
    logprob_chunk: Positive = 1024
    router_loss: float | None = Field(default=None, ge=0)
    lora: LoraSpec | None = None

    def resolved(self) -> dict[str, Any]:
        # An option that is not set is left out: what was made before it existed keeps its key.
        unset = ["router_loss"] if self.router_loss is None else []
        return {name: value for name, value in super().resolved().items() if name not in unset}

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


_XlaName = Annotated[str, Field(pattern=r"^xla_\w+$")]


class MeshSpec(Spec):
    """Devices per mesh axis; -1 (one axis at most) takes what is left.

    Attributes:
      data: across slices or machines with a slow network between them: splits rows, repeats parameters.
      fsdp: splits rows and parameters.
      expert: splits rows, and the experts of a mixture of experts.
      tensor: splits heads, MLP columns and the vocabulary; keep it within one machine.
      axis_type: "auto": the compiler propagates shardings; "explicit": they are part of array types.
      libtpu_args: arguments of the TPU compiler for every program of the run, by name, such as
        `xla_tpu_scheduler_percent_shared_memory_limit: 40` (less memory, fewer transfers at a time). Elsewhere they
        change nothing.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1
    axis_type: Literal["auto", "explicit"] = "auto"
    libtpu_args: dict[_XlaName, bool | int | float | str] = Field(default_factory=dict)


# ---- training --------------------------------------------------------------------------------------------------


class OptimizerSpec(Spec):
    """Optimiser and learning-rate schedule.

    Attributes:
      warmup: optimiser steps of linear warm-up from 0. clip_norm: global gradient norm; None: no clipping.
      momentum, decay: of RMSprop (`decay` is torch's alpha, 0.99 in the paper).
      b2: of AdamW's second moment, or of Lion's momentum: there 0.99 if not given (Chen et al. 2023, section 4).
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

    @model_validator(mode="before")
    @classmethod
    def _lion_b2(cls, data: Any) -> Any:
        """Written down here, so that the saved configuration and a stage's key hold the value that is used."""
        return {"b2": 0.99} | data if isinstance(data, dict) and data.get("name") == "lion" else data

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


class BestSpec(Spec):
    """Which checkpoints are the best.

    Attributes:
      metric: a column of the run's `metrics.jsonl`, for example `loss` or `eval/reward`; a checkpoint counts by its
        mean over the rows since the checkpoint before. count: how many stay. mode: what is better.
    """

    metric: str
    count: Positive = 1
    mode: Literal["max", "min"] = "max"


class TrainSpec(Spec):
    """What every training stage shares.

    Attributes:
      epochs / steps: give one; an optimiser step is one update.
      batch_size: sequences (SFT) or pairs (preferences) per update, over all devices. With packing, the rows.
      micro_batch: sequences, pairs or rows per forward pass; None: the whole batch at once.
      max_length: tokens of prompt and response; max_prompt_length: of the prompt alone, when truncation is needed.
      save_every: optimiser steps between checkpoints; 0: one at the end alone.
      sample_every: optimiser steps between tables of sampled completions; 0: none.
      keep: how many of the newest checkpoints stay. keep_every: those whose step is a multiple of it stay as well; 0:
        none. keep_best: and the best by a metric; None: none. A run resumes from the newest, whatever is kept.
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
    sample_every: int = Field(default=0, ge=0)
    keep: Positive = 2
    keep_every: int = Field(default=0, ge=0)
    keep_best: BestSpec | None = None

    def resolved(self) -> dict[str, Any]:
        # Options that are not set are left out: what was made before they existed keeps its key.
        unset = [name for name in ("keep_every", "keep_best") if not getattr(self, name)]
        return {name: value for name, value in super().resolved().items() if name not in unset}

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


class PairTrainSpec(TrainSpec):
    """What the stages that train on pairs share.

    Attributes:
      share_prompts: with packing, the prompt of a pair is computed once for both answers; rows are then twice as long
        and half as many. Same loss, another order of float sums. Not done on TPUs, whose attention kernel cannot
        express who sees whom there.
    """

    share_prompts: bool = True

    def unused(self) -> dict[str, tuple[str, str]]:
        return {} if self.packing else {"share_prompts": ("`packing: false`", "`packing: true`")}


PreferenceLoss = Literal[
    "sigmoid", "conservative", "robust", "ipo", "ipo_averaged", "hinge", "simpo", "length_normalised"
]


class DpoSpec(PairTrainSpec):
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
        unused = super().unused()
        unused |= {
            key: (choice, " and ".join(names)) for key, names in uses.items() if self.loss not in names
        }
        if self.loss == "simpo":
            unused["reference_free"] = (choice, "the losses that have a reference")
        return unused


class SamplingSpec(Spec):
    """How text is generated. `temperature: 0` is greedy; `top_k: 0` and `top_p: 1` are off.

    `batch_size`: rows decoded together; `samples`: completions per prompt. `kv_cache`: how the keys and values of
    earlier tokens are kept: "compute": in the model's dtype; "int8": in 8 bits, with a scale per token and head, which
    takes about a half (bfloat16) or a quarter (float32) of the memory and moves log-probs a little.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: Positive = 256
    samples: Positive = 1
    batch_size: Positive = 32
    kv_cache: Literal["compute", "int8"] = "compute"

    def resolved(self) -> dict[str, Any]:
        """All values; `kv_cache` only where it is not the usual one, so that older artifacts keep their names."""
        return {
            name: value for name, value in super().resolved().items() if name != "kv_cache" or value == "int8"
        }

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.temperature > 0:
            return {}
        return dict.fromkeys(("top_p", "top_k"), ("`temperature: 0` (greedy)", "a temperature above 0"))
