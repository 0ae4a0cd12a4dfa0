"""What a decoder is: one frozen, hashable description that covers every supported family."""

from dataclasses import dataclass
from typing import Literal

from laif_jax.config.schema import LoraSpec
from laif_jax.records.errors import LaifError

Family = Literal["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox"]
Head = Literal["lm", "score", "both"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


class UnsupportedModelError(LaifError, ValueError):
    """The model (or one field of its `config.json`) asks for maths that this decoder does not have."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and its scaling to longer contexts.

    Attributes:
      kind: "default"; "linear" (position interpolation); "dynamic" (NTK-aware, by the length at hand); "llama3";
        "yarn" (Peng et al. 2023).
      theta: base wavelength.
      fraction: share of the head dimension that is rotated (GPT-NeoX: 0.25).
      factor: context extension; None (yarn only): max_position / original_max_position.
      original_max_position: context length before the extension (llama3, yarn).
      low_freq_factor, high_freq_factor: of llama3.
      attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate: of yarn, as `transformers` names them.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    fraction: float = 1.0
    factor: float | None = None
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Hashable, so that it can be a static argument of jitted functions.

    Attributes:
      family: `model_type` of the Hugging Face configuration that it came from (and is written as).
      num_kv_heads: key/value heads; each serves num_heads / num_kv_heads query heads.
      max_position: `max_position_embeddings`; only the dynamic and yarn rotary scalings compute with it.
      norm: RMSNorm or LayerNorm. unit_offset: RMSNorm multiplies by 1 + scale (Gemma).
      activation: "silu", "gelu" (erf), "gelu_tanh" or "relu".
      gated_mlp: act(gate(x)) * up(x), else act(up(x)).
      num_experts: MLPs per layer, of which a router picks `experts_per_token` for each token; 0: one MLP and no router.
      router_loss: weight of the load-balancing loss in training (`router_aux_loss_coef`); 0: none.
      post_norms: norms after attention and MLP, before the residual sum (Gemma).
      parallel_residual: attention and MLP both read the block's input (GPT-NeoX).
      embed_scale: embeddings are multiplied by sqrt(hidden_size) (Gemma).
      attn_scale: factor of the attention scores, usually head_dim ** -0.5.
      attn_softcap, final_softcap: c tanh(x / c) on attention scores and on logits (Gemma 2).
      windows: per layer, how many of the last tokens a token sees, itself included; 0: all.
      ropes: the distinct rotary embeddings; rope_index: per layer, which of them it uses.
      initializer_range: standard deviation of new weights.
      head: what reads the final hidden states: "lm": the vocabulary; "score": one scalar, and no `lm_head` (reward and
        value models); "both": a language model with a scalar beside it (a value head on a policy's trunk).
      lora: low-rank adapters on some linear layers, or None.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    unit_offset: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    router_loss: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    parallel_residual: bool = False
    embed_scale: bool = False
    attn_scale: float = 0.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    windows: tuple[int, ...] = ()
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    rope_index: tuple[int, ...] = ()
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    head: Head = "lm"
    lora: LoraSpec | None = None

    def __post_init__(self) -> None:
        """Fills the per-layer defaults and checks the sizes."""
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.num_layers)
        if not self.rope_index:
            object.__setattr__(self, "rope_index", (0,) * self.num_layers)
        if not self.attn_scale:
            object.__setattr__(self, "attn_scale", self.head_dim**-0.5)
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads = {self.num_heads} is not a multiple of num_key_value_heads = {self.num_kv_heads}"
            )
        if len(self.windows) != self.num_layers or len(self.rope_index) != self.num_layers:
            raise UnsupportedModelError(
                f"{len(self.windows)} layer types for num_hidden_layers = {self.num_layers}; give one per layer"
            )
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise UnsupportedModelError(
                f"num_experts_per_tok = {self.experts_per_token} must be from 1 to num_local_experts = "
                f"{self.num_experts}"
            )
        for rope in self.ropes:
            if self.rotary_dim(rope) % 2 or self.rotary_dim(rope) == 0:
                raise UnsupportedModelError(
                    f"rotary embedding of {rope.fraction} x head_dim {self.head_dim} = {self.rotary_dim(rope)} "
                    "dimensions; it must be even and above 0"
                )

    def rotary_dim(self, rope: RopeConfig) -> int:
        """How many of the head's dimensions `rope` rotates."""
        return int(self.head_dim * rope.fraction)

    @property
    def uniform_window(self) -> int | None:
        """The window that all layers share (0: none), or None if they differ."""
        return self.windows[0] if len(set(self.windows)) == 1 else None
