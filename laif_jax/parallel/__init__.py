"""The mesh, the sharding rules and the start-up of several processes."""

from laif_jax.parallel.distributed import (
    DistributedError,
    barrier,
    broadcast_json,
    from_main,
    gather_to_host,
    initialize,
    is_main,
    process_count,
    process_index,
)
from laif_jax.parallel.mesh import AXES, ROW_AXES, MeshError, make_mesh, row_parts, row_shard
from laif_jax.parallel.rules import (
    RULES,
    ShardingError,
    batch_sharding,
    batch_shardings,
    constrain,
    host_to_global,
    param_shardings,
    partition_spec,
    replicate,
    sharding_for,
)

__all__ = [
    "AXES",
    "ROW_AXES",
    "RULES",
    "DistributedError",
    "MeshError",
    "ShardingError",
    "barrier",
    "batch_sharding",
    "batch_shardings",
    "broadcast_json",
    "constrain",
    "from_main",
    "gather_to_host",
    "host_to_global",
    "initialize",
    "is_main",
    "make_mesh",
    "param_shardings",
    "partition_spec",
    "process_count",
    "process_index",
    "replicate",
    "row_parts",
    "row_shard",
    "sharding_for",
]
