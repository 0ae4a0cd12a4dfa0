"""Parameters in the dtype that they are computed with."""

from typing import Any

import jax


def in_compute_dtype(params: Any, dtype: Any) -> Any:
    """Weights in the compute dtype, which every use would cast them to; norms and scalar heads compute in float32 from
    what they are, and stay. Arrays that are in it are not copied."""

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        keep = any(str(entry.key).endswith("norm") or entry.key == "score" for entry in path)
        return leaf if keep or leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params)
