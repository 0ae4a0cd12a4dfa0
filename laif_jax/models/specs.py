"""The one table of parameters: shape, logical axes and initialiser of each, for any `ModelConfig`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from laif_jax.models.arch import ModelConfig, UnsupportedModelError

Init = Literal["normal", "zeros", "ones"]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. `logical_axes` names what each axis is, for the sharding rules; `stddev` is of a "normal" init."""

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    init: Init
    stddev: float = 0.0


Specs = dict[str, Any]  # nested dict with ParamSpec leaves


def _norm(cfg: ModelConfig, size: int, axis: str) -> Specs:
    specs: Specs = {"scale": ParamSpec((size,), (axis,), "zeros" if cfg.unit_offset else "ones")}
    if cfg.norm == "layer":
        specs["bias"] = ParamSpec((size,), (axis,), "zeros")
    return specs


def _linear(
    cfg: ModelConfig,
    name: str,
    inputs: tuple[tuple[int, str], ...],
    outputs: tuple[tuple[int, str], ...],
    *,
    bias: bool,
    stddev: float,
    experts: int = 0,
) -> Specs:
    """A linear map from axes `inputs` to axes `outputs`, each (size, logical name), with its adapter if it has one.
    `experts` > 0: that many of them, stacked on the first axis."""
    in_shape, in_axes = zip(*inputs)
    out_shape, out_axes = zip(*outputs)
    lead, lead_axes = ((experts,), ("expert",)) if experts else ((), ())

    def weight(shape: tuple[int, ...], axes: tuple[str, ...], init: Init, stddev: float = 0.0) -> ParamSpec:
        return ParamSpec(lead + shape, lead_axes + axes, init, stddev)

    specs: Specs = {"kernel": weight(in_shape + out_shape, in_axes + out_axes, "normal", stddev)}
    if bias:
        specs["bias"] = ParamSpec(out_shape, out_axes, "zeros")
    if cfg.lora is not None and name in cfg.lora.targets:
        rank = cfg.lora.rank
        fan_in = math.prod(in_shape)
        specs["lora_a"] = weight(in_shape + (rank,), in_axes + ("lora",), "normal", fan_in**-0.5)
        specs["lora_b"] = weight((rank,) + out_shape, ("lora",) + out_axes, "zeros")
    return specs


def block_specs(cfg: ModelConfig) -> Specs:
    """Specs of one block, without the stacking axis."""
    embed, mlp = (cfg.hidden_size, "embed"), (cfg.intermediate_size, "mlp")
    heads, kv_heads = (cfg.num_heads, "heads"), (cfg.num_kv_heads, "kv_heads")
    head_dim = (cfg.head_dim, "head_dim")
    std = cfg.initializer_range
    # GPT-2: what writes into the residual stream starts smaller, so that depth does not grow its variance.
    out_std = std / math.sqrt(2 * cfg.num_layers)

    def linear(name, inputs, outputs, bias, stddev=std, experts=0):
        return _linear(cfg, name, inputs, outputs, bias=bias, stddev=stddev, experts=experts)

    attn: Specs = {
        "q": linear("q", (embed,), (heads, head_dim), cfg.qkv_bias),
        "k": linear("k", (embed,), (kv_heads, head_dim), cfg.qkv_bias),
        "v": linear("v", (embed,), (kv_heads, head_dim), cfg.qkv_bias),
        "o": linear("o", (heads, head_dim), (embed,), cfg.o_bias, out_std),
    }
    if cfg.qk_norm:
        attn["q_norm"] = _norm(cfg, cfg.head_dim, "head_dim")
        attn["k_norm"] = _norm(cfg, cfg.head_dim, "head_dim")
    experts = cfg.num_experts
    ffn: Specs = {}
    if experts:
        # No bias and no adapter: an adapter's name is its target's, and none is called router.
        ffn["router"] = {"kernel": ParamSpec((cfg.hidden_size, experts), ("embed", None), "normal", std)}
    if cfg.gated_mlp:
        ffn["gate"] = linear("gate", (embed,), (mlp,), cfg.mlp_bias, experts=experts)
    ffn["up"] = linear("up", (embed,), (mlp,), cfg.mlp_bias, experts=experts)
    ffn["down"] = linear("down", (mlp,), (embed,), cfg.mlp_bias, out_std, experts=experts)
    specs: Specs = {
        "attn_norm": _norm(cfg, cfg.hidden_size, "embed"),
        "attn": attn,
        "mlp_norm": _norm(cfg, cfg.hidden_size, "embed"),
        "mlp": ffn,
    }
    if cfg.post_norms:
        specs["post_attn_norm"] = _norm(cfg, cfg.hidden_size, "embed")
        specs["post_mlp_norm"] = _norm(cfg, cfg.hidden_size, "embed")
    return specs


def _stack(specs: Specs, num_layers: int) -> Specs:
    stacked: Specs = {}
    for name, spec in specs.items():
        if isinstance(spec, ParamSpec):
            shape, axes = (num_layers,) + spec.shape, ("layers",) + spec.logical_axes
            stacked[name] = ParamSpec(shape, axes, spec.init, spec.stddev)
        else:
            stacked[name] = _stack(spec, num_layers)
    return stacked


def param_specs(cfg: ModelConfig) -> Specs:
    """The parameter tree of `cfg` with a `ParamSpec` for each array; leaves under "layers" are stacked on axis 0.

    Raises:
      UnsupportedModelError: adapters are asked for on layers that this model does not have.
    """
    block = block_specs(cfg)
    if cfg.lora is not None and not {*block["attn"], *block["mlp"]} & set(cfg.lora.targets):
        raise UnsupportedModelError(
            f"LoRA targets {cfg.lora.targets}: a {cfg.family} model has none of these linear layers; choose among "
            f"{[name for name in (*block['attn'], *block['mlp']) if not name.endswith('norm')]}"
        )
    table = ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), "normal", cfg.initializer_range)
    specs: Specs = {
        "embed": {"embedding": table},
        "layers": _stack(block, cfg.num_layers),
        "final_norm": _norm(cfg, cfg.hidden_size, "embed"),
    }
    if cfg.head != "score" and not cfg.tie_embeddings:
        shape = (cfg.hidden_size, cfg.vocab_size)
        specs["lm_head"] = {"kernel": ParamSpec(shape, ("embed", "vocab"), "normal", cfg.initializer_range)}
    if cfg.head != "lm":
        # Stiennon et al. 2020: hidden states are of norm sqrt(D), so that fresh scores have a variance near 1.
        specs["score"] = {
            "kernel": ParamSpec(
                (cfg.hidden_size, 1), ("embed", None), "normal", (cfg.hidden_size + 1) ** -0.5
            )
        }
    return specs
