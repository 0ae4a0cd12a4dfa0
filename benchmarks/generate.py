"""Tokens per second of generation: python -m benchmarks.generate [--json].

A Llama of the given size with random weights draws tokens for prompts of mixed length, as many for each as `--new` says
(no end of text). The first call compiles and is timed apart. Limits of their own for each prompt:
`python -m benchmarks.run --task generate --lengths real`.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax.config.schema import SamplingSpec, ScratchSpec
from laif_jax.models.config import scratch
from laif_jax.models.decoder import init_params
from laif_jax.rollout.generate import generate


def measure(options: argparse.Namespace) -> dict[str, float | int | str]:
    """Runs the benchmark; rates are in drawn tokens per second of wall time, prefill included."""
    sizes = ScratchSpec(
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=max(1, options.heads // 3),
        max_position=options.prompt + options.new,
    )
    cfg = scratch(sizes, options.vocab)
    dtype = jnp.dtype(options.dtype)
    params = init_params(cfg, jax.random.key(0), dtype)
    rng = np.random.default_rng(0)
    lengths = rng.integers(options.prompt // 2, options.prompt + 1, options.prompts or options.batch)
    prompts = [rng.integers(0, options.vocab, n).tolist() for n in lengths]
    spec = SamplingSpec(
        top_p=options.top_p,
        max_new_tokens=options.new,
        batch_size=options.batch,
        samples=options.samples,
        kv_cache=options.kv_cache,
    )
    seconds = []
    for i in range(options.repeat + 1):
        start = time.perf_counter()
        samples = generate(params, cfg, prompts, spec, jax.random.key(i), dtype=dtype, eos_ids=())
        seconds.append(time.perf_counter() - start)
    drawn = sum(len(sample.tokens) for sample in samples)
    best = min(seconds[1:])
    return {
        "device": jax.devices()[0].device_kind,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "batch": options.batch,
        "tokens": drawn,
        "compile_seconds": round(seconds[0] - best, 3),
        "seconds": round(best, 4),
        "tokens_per_second": round(drawn / best, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = {"hidden": 192, "layers": 6, "heads": 6, "vocab": 8192, "batch": 8, "prompt": 64, "new": 64}
    for name, default in {**numbers, "repeat": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompts", type=int, default=0, help="0: as many as the batch has rows")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt")
    parser.add_argument("--kv-cache", choices=("compute", "int8"), default="compute")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result) if options.json else "\n".join(f"{k:20} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
