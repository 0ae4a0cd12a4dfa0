"""Rotary settings in `config.json`: `rope_theta` + `rope_scaling` (transformers 4), `rope_parameters` (5), and back."""

from collections.abc import Mapping
from typing import Any

from laif_jax.models.arch import Family, ModelConfig, RopeConfig, UnsupportedModelError

_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# Per rope type: the keys it must have, and the keys it may have.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": ((), ("factor", "original_max_position_embeddings", *_YARN)),
}
# Written by some fine-tunes, read by nobody.
_HARMLESS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}


def _read_rope(
    params: Mapping[str, Any] | None, theta: float, fraction: float, max_position: int, original: int | None
) -> RopeConfig:
    """One rope from its dict; `theta` and `fraction` stand in where the dict is silent."""
    params = dict(params or {})
    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in _KEYS:
        raise UnsupportedModelError(f"rope type {kind!r} is not supported; supported: {', '.join(_KEYS)}")
    required, optional = _KEYS[kind]
    missing = [key for key in required if params.get(key) is None]
    if missing:
        raise UnsupportedModelError(f"rope scaling of type {kind!r} lacks {', '.join(missing)}: {params}")
    unknown = {key: value for key, value in params.items() if value is not None}
    unknown = {key: unknown[key] for key in unknown.keys() - {*required, *optional} - _HARMLESS}
    # A full dict with `factor: 1` and the like is left behind by some tools: only what would matter is refused.
    unknown = {key: value for key, value in unknown.items() if not (key == "factor" and value == 1.0)}
    if unknown:
        raise UnsupportedModelError(f"rope scaling of type {kind!r}: {unknown} are unknown or have no effect")
    values: dict[str, Any] = {
        key: params.get(key) for key in (*required, *optional) if key != "original_max_position_embeddings"
    }
    if values.get("truncate") is None:
        values.pop("truncate", None)
    if kind in ("llama3", "yarn"):
        # As in transformers: the field beside the dict wins over the one in it.
        inner = params.get("original_max_position_embeddings")
        values["original_max_position"] = original or inner or max_position
    return RopeConfig(
        kind=kind,
        theta=float(params.get("rope_theta") or theta),
        fraction=float(params.get("partial_rotary_factor") or fraction),
        **values,
    )


def read_ropes(
    fields: Mapping[str, Any], family: Family, layer_types: tuple[str, ...]
) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """The distinct ropes of a model and, per layer, which one it uses.

    Raises:
      UnsupportedModelError: a rope type or key that is not known.
    """
    params = fields["rope_parameters"]
    scaling = fields["rope_scaling"]
    theta, fraction = fields["rope_theta"], 1.0
    if family == "gpt_neox":
        theta = fields["rotary_emb_base"] or theta
        fraction = fields["rotary_pct"] or fields["partial_rotary_factor"] or 0.25
    elif fields["partial_rotary_factor"] not in (None, 1.0):
        raise UnsupportedModelError(
            f"`partial_rotary_factor: {fields['partial_rotary_factor']}` of a {family} model: supported for gpt_neox"
        )
    rest = (fields["max_position_embeddings"], fields["original_max_position_embeddings"])
    nested = isinstance(params, Mapping) and any(isinstance(value, Mapping) for value in params.values())
    if family != "gemma3_text":
        if nested:
            raise UnsupportedModelError(
                f"`rope_parameters` per layer type in a {family} model: only gemma3 has them"
            )
        rope = _read_rope(scaling or params, theta or 10000.0, fraction, *rest)
        if rope.fraction != 1.0 and family != "gpt_neox":
            raise UnsupportedModelError(f"`partial_rotary_factor: {rope.fraction}` of a {family} model")
        return (rope,), (0,) * len(layer_types)
    if params is not None and not nested:
        raise UnsupportedModelError(
            "`rope_parameters` of a gemma3 model must be given per layer type (full_attention, sliding_attention)"
        )
    per_type = dict(params or {})
    full = {**(per_type.get("full_attention") or {}), **(scaling or {})}
    local_theta = fields["rope_local_base_freq"] or 10000.0
    ropes = (
        _read_rope(full, theta or 1e6, 1.0, *rest),
        _read_rope(per_type.get("sliding_attention"), local_theta, 1.0, *rest),
    )
    return ropes, tuple(int(kind == "sliding_attention") for kind in layer_types)


def _write_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` dict, or None where there is no scaling."""
    if rope.kind == "default":
        return None
    values: dict[str, Any] = {"rope_type": rope.kind}
    required, optional = _KEYS[rope.kind]
    for key in (*required, *optional):
        name = "original_max_position" if key == "original_max_position_embeddings" else key
        if getattr(rope, name) is not None:
            values[key] = getattr(rope, name)
    # transformers 5 wants the key of a yarn scaling to be there even where it is derived.
    if rope.kind == "yarn":
        values.setdefault("factor", None)
    return values


def write_ropes(cfg: ModelConfig) -> dict[str, Any]:
    """The rotary fields of `config.json`, in the older form, which both generations of transformers load."""
    rope = cfg.ropes[0]
    scaling = _write_scaling(rope)
    if cfg.family == "gpt_neox":
        fields: dict[str, Any] = {"rotary_emb_base": rope.theta, "rotary_pct": rope.fraction}
    elif cfg.family == "gemma3_text":
        local = cfg.ropes[1]
        if local.kind != "default":
            # Only the newer form can say that the local layers are scaled too.
            both = {"full_attention": rope, "sliding_attention": local}
            default = {"rope_type": "default"}
            params = {
                name: (_write_scaling(r) or default) | {"rope_theta": r.theta} for name, r in both.items()
            }
            return {"rope_parameters": params}
        fields = {"rope_theta": rope.theta, "rope_local_base_freq": local.theta}
    else:
        fields = {"rope_theta": rope.theta}
    return fields | {"rope_scaling": scaling}
