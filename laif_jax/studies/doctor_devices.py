"""`python -m laif_jax.studies.doctor_devices`: what JAX finds here, as one line of JSON behind MARK.

A process of its own: looking for devices can hang (another process holds the chips, or the other hosts of a slice have
not started) or kill the process (a driver that does not match).
"""

import json
import sys

MARK = "laif-devices "


def find() -> dict[str, object]:
    """Platform, kind and number of devices, slices, processes, and a device's memory in bytes (None: not told)."""
    try:
        from laif_jax.parallel import distributed
    except ImportError:  # told by the check of the packages; the devices can be found without
        distributed = None
    if distributed is not None:
        distributed.initialize(timeout=60)
    import jax

    devices = jax.devices()
    memory = devices[0].memory_stats() if devices[0].process_index == jax.process_index() else None
    slices = {getattr(device, "slice_index", 0) for device in devices}
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "local": jax.local_device_count(),
        "slices": len(slices),
        "processes": jax.process_count(),
        "process": jax.process_index(),
        "memory_bytes": (memory or {}).get("bytes_limit"),
    }


if __name__ == "__main__":
    sys.stdout.write(MARK + json.dumps(find()) + "\n")
