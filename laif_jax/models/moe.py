"""A mixture of experts in the place of the MLP (Shazeer et al. 2017; Jiang et al. 2024, Mixtral).

Every token goes to the k experts that the router finds most likely, and none is dropped: the (token, expert) pairs are
sorted by expert, and one `jax.lax.ragged_dot` multiplies each group with its own weights. The largest arrays are
[pairs, F], where pairs = k tokens; there is none of [tokens, E, F]. (XLA's CPU backend has no ragged product and spells
it out as a masked one over all experts: right, and as slow as it sounds.)

On a mesh, each device holds its part of the experts (axis `expert`) and of their columns (axis `tensor`). The devices
of these two axes gather their tokens, compute what their own weights give, and add up while every device takes back its
own tokens (a reduce-scatter). So the result is the same for every mesh, up to the order of float sums. With the experts
split, the buffer of a device has room for all pairs that could be its: tokens of the group times min(k, its experts).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from laif_jax.models.arch import ModelConfig
from laif_jax.parallel.mesh import row_parts
from laif_jax.parallel.rules import mesh_in_force, partition_spec

Array = jax.Array
Kernels = Mapping[
    str, Mapping[str, Array]
]  # linear -> {"kernel", "lora_a", "lora_b"}, each with the experts first
Activation = Callable[[Array], Array]


class RouterLoad(NamedTuple):
    """What the load-balancing loss reads, as float32 sums over real tokens (of any number of layers).

    `chosen` [E]: how often each expert was chosen; `probs` [E]: its probabilities; `tokens` []: their number.
    """

    chosen: Array
    probs: Array
    tokens: Array


class Routing(NamedTuple):
    """`experts` int32 [R, T, k], the chosen ones; `weights` float32 [R, T, k], their probabilities scaled to sum 1."""

    experts: Array
    weights: Array


def route(x: Array, kernel: Array, cfg: ModelConfig) -> tuple[Routing, Array]:
    """The routing of tokens x [R, T, D] by the router's kernel [D, E], and all probabilities float32 [R, T, E]."""
    scores = jnp.einsum("rtd,de->rte", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(scores, axis=-1)
    best, experts = jax.lax.top_k(probs, cfg.experts_per_token)
    return Routing(experts, best / best.sum(axis=-1, keepdims=True)), probs


def router_load(routing: Routing, probs: Array, real: Array) -> RouterLoad:
    """The load over the tokens where `real` [R, T] is not 0."""
    real = (real != 0).astype(jnp.float32)
    hits = jax.nn.one_hot(routing.experts, probs.shape[-1], dtype=jnp.float32).sum(axis=2)  # [R, T, E]
    chosen, sums = (jnp.einsum("rte,rt->e", values, real) for values in (hits, probs))
    return RouterLoad(chosen, sums, real.sum())


def balance_loss(load: RouterLoad) -> Array:
    """The load-balancing loss of Fedus et al. 2021 (equations 4 to 6), as `transformers` computes it for k experts per
    token: E sum_e (share of tokens sent to e) (mean probability of e), float32 []. Evenly spread, it is k."""
    tokens = jnp.maximum(load.tokens, 1.0)
    return load.chosen.size * jnp.sum((load.chosen / tokens) * (load.probs / tokens))


# ---- the experts -----------------------------------------------------------------------------------------------


def mixture(
    x: Array,
    real: Array | None,
    kernels: Kernels,
    axes: Mapping[str, Mapping[str, tuple[str | None, ...]]],
    cfg: ModelConfig,
    act: Activation,
) -> tuple[Array, RouterLoad | None]:
    """sum over a token's experts of weight times down(act(gate(x)) * up(x)).

    Args:
      x: [R, T, D]. real: [R, T], not 0 at the tokens that count for the load, or None.
      kernels: of "router", "gate", "up" and "down", in the dtype of `x`. axes: their logical axes.

    Returns:
      [R, T, D] in the dtype of `x`, and the load of the experts (None without `real`).
    """
    mesh = mesh_in_force(x)
    layout = None if mesh is None else _layout(x, kernels, axes, mesh)
    if mesh is None or layout is None:
        routing, load = _route_and_load(x, real, kernels["router"]["kernel"], cfg)
        return _experts(x, routing, kernels, cfg, act, jnp.int32(0)), load

    def run(x: Array, real: Array | None, kernels: Kernels) -> tuple[Array, RouterLoad | None]:
        return _on_device(x, real, kernels, cfg, act, layout)

    specs, out = (layout.stream, P(*layout.stream[:2]), layout.kernels), (layout.stream, P())
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out)(x, real, kernels)


def _route_and_load(
    x: Array, real: Array | None, kernel: Array, cfg: ModelConfig
) -> tuple[Routing, RouterLoad | None]:
    routing, probs = route(x, kernel, cfg)
    return routing, None if real is None else router_load(routing, probs, real)


class _Layout(NamedTuple):
    """How arrays lie on the mesh. `tokens`: the axes that split the tokens; `gathered`: dimension of x -> axis over
    which a group shares its tokens; `summed`: axes whose devices hold the same tokens, and parts of the weights."""

    stream: P
    tokens: tuple[str, ...]
    kernels: Any
    experts: bool  # the experts are split
    gathered: dict[int, str]
    summed: tuple[str, ...]


def _layout(x: Array, kernels: Kernels, axes: Any, mesh: Mesh | AbstractMesh) -> _Layout | None:
    """None where the rows do not divide over the mesh: then the compiler places what `_experts` computes."""
    if mesh.size == 1 or x.shape[0] % row_parts(mesh):
        return None
    stream = partition_spec(("batch", "length", "embed"), x.shape, mesh)
    specs = {
        linear: {
            name: partition_spec(axes[linear][name], leaf.shape, mesh, name=f"experts' {linear} {name}")
            for name, leaf in leaves.items()
        }
        for linear, leaves in kernels.items()
    }
    split = {
        "expert": specs["gate"]["kernel"][0] == "expert",
        "tensor": specs["gate"]["kernel"][-1] == "tensor",
    }
    place = {"expert": 0, "tensor": 1}  # dimensions of x that these axes split
    gathered = {place[axis]: axis for axis in split if split[axis] and _names(stream[place[axis]], axis)}
    summed = tuple(axis for axis in split if split[axis] and axis not in gathered.values())
    tokens = tuple(axis for axis in mesh.axis_names if any(_names(entry, axis) for entry in stream))
    return _Layout(stream, tokens, specs, split["expert"], gathered, summed)


def _names(entry: Any, axis: str) -> bool:
    return axis == entry or (isinstance(entry, tuple) and axis in entry)


def _on_device(
    x: Array, real: Array | None, kernels: Kernels, cfg: ModelConfig, act: Activation, layout: _Layout
) -> tuple[Array, RouterLoad | None]:
    """One device's part, inside a `shard_map`."""

    def whole(path: Any, leaf: Array, spec: P) -> Array:
        """The weights of this device's experts and columns, which `fsdp` has split further; all of the router's."""
        kept = () if path[0].key == "router" else ("expert", "tensor")
        for dim, entry in enumerate(spec):
            names = entry if isinstance(entry, tuple) else (entry,)
            if rest := tuple(axis for axis in names if axis not in (None, *kept)):
                leaf = jax.lax.all_gather(leaf, rest, axis=dim, tiled=True)
        return leaf

    kernels = jax.tree_util.tree_map_with_path(whole, dict(kernels), layout.kernels)
    routing, load = _route_and_load(x, real, kernels["router"]["kernel"], cfg)  # of this device's tokens
    load = jax.tree.map(lambda part: jax.lax.psum(part, layout.tokens) if layout.tokens else part, load)
    for dim, axis in layout.gathered.items():
        x, routing = jax.tree.map(
            lambda leaf, dim=dim, axis=axis: jax.lax.all_gather(leaf, axis, axis=dim, tiled=True),
            (x, routing),
        )
    first = (
        jax.lax.axis_index("expert") * kernels["gate"]["kernel"].shape[0] if layout.experts else jnp.int32(0)
    )
    y = _experts(x, routing, kernels, cfg, act, first)
    for dim, axis in layout.gathered.items():
        y = jax.lax.psum_scatter(y, axis, scatter_dimension=dim, tiled=True)
    return jax.lax.psum(y, layout.summed) if layout.summed else y, load


def _experts(
    x: Array, routing: Routing, kernels: Kernels, cfg: ModelConfig, act: Activation, first: Array
) -> Array:
    """What the experts `first` and following, whose weights are here, add to each token; x [R, T, D]."""
    flat = x.reshape(-1, x.shape[-1])
    held, k = kernels["gate"]["kernel"].shape[0], routing.experts.shape[-1]
    local = routing.experts.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < held), local, held)
    # Pairs of this device's experts come first; a token has at most min(k, held) of them.
    order = jnp.argsort(local, stable=True)[: flat.shape[0] * min(k, held)]
    sizes = jnp.sum(local[:, None] == jnp.arange(held), axis=0, dtype=jnp.int32)
    # Beyond the last group a ragged product may hold anything, forward and backward: both ends are masked.
    mine = (jnp.arange(order.shape[0]) < sizes.sum())[:, None]
    token = order // k

    def linear(name: str, x: Array) -> Array:
        leaves = kernels[name]
        y = jax.lax.ragged_dot(x, leaves["kernel"], sizes)
        if "lora_a" in leaves:
            assert cfg.lora is not None
            low = jax.lax.ragged_dot(x, leaves["lora_a"], sizes)
            y = y + jax.lax.ragged_dot(low, leaves["lora_b"], sizes) * (cfg.lora.alpha / cfg.lora.rank)
        return y

    picked = jnp.where(mine, flat[token], 0)
    hidden = act(linear("gate", picked)) * linear("up", picked)
    weights = routing.weights.reshape(-1)[order].astype(x.dtype)
    out = jnp.where(mine, linear("down", hidden), 0) * weights[:, None]
    return jnp.zeros_like(flat).at[token].add(out).reshape(x.shape)
