"""What the compiled train step sends between devices: one text file per model and mesh, to be read in a diff.

    python -m tests.parallel.collectives      writes tests/parallel/goldens/collectives/*.txt anew

A line is a kind of collective and the shape of what one device gets from it, and how often it is in the program (one in
a loop counts once). The compiler decides; so files are compared where JAX is the version that wrote them.
"""

import math
import os
import re
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # before JAX is imported; under pytest it is set already
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from laif_jax.config.schema import ScratchSpec
from laif_jax.models.config import ModelConfig, from_hf, scratch
from laif_jax.training.tasks import SftTask
from tests.training import small

FOLDER = Path(__file__).parent / "goldens" / "collectives"
ROWS, LENGTH, WIDTH, VOCAB = 32, 64, 32, 160
ACTIVATIONS = 4 * ROWS * LENGTH * WIDTH  # bytes of the residual stream of all devices' rows
CASES: dict[str, dict[str, int]] = {
    "llama fsdp=8": {"fsdp": 8},
    "llama fsdp=2 tensor=4": {"fsdp": 2, "tensor": 4},
    "mixtral fsdp=2 expert=2 tensor=2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_LINE = re.compile(rf" = (?P<type>\(.*?\)|\S+) (?P<kind>{_KINDS})(-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


def config(case: str) -> ModelConfig:
    sizes = ScratchSpec(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        tie_embeddings=False,
    )
    if case.startswith("llama"):
        return scratch(sizes, VOCAB)
    return from_hf(
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "max_position_embeddings": 64,
        }
    )


def program(case: str) -> str:
    """The compiled SFT step, in float32 with rematerialised blocks and chunked log-probs."""
    task = SftTask(config(case), "token", "float32", "full", 128)
    on = small.mesh(**CASES[case])
    batch = {name: np.zeros((1, ROWS, LENGTH), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = np.zeros((1, ROWS, LENGTH), np.float32)
    state = small.fresh_state(task, on)
    hyper = {name: np.float32(0.1) for name in ("learning_rate", "clip_norm")}
    lowered = small.make_step(task, state, batch, on).lower(state, batch, hyper)
    return lowered.compile({"xla_backend_optimization_level": 0}).as_text()


def collectives(text: str) -> Counter[tuple[str, str, tuple[int, ...]]]:
    """{(kind, dtype, shape of the result on one device): number of them} in an HLO text."""
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for line in text.splitlines():
        if match := _LINE.search(line):
            for array in _ARRAY.finditer(match["type"]):
                shape = tuple(int(n) for n in array["shape"].split(",") if n)
                found[match["kind"], array["dtype"], shape] += 1
    return found


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes."""
    return _BYTES[dtype] * math.prod(shape)


def text(case: str) -> str:
    found = collectives(program(case))
    lines = [f"# jax {jax.__version__}", f"# sft, {case}", ""]
    lines += [
        f"{kind:18} {dtype:5} {list(shape)!s:20} {count}"
        for (kind, dtype, shape), count in sorted(found.items())
    ]
    lines.append("")
    for kind in sorted({kind for kind, *_ in found}):
        mine = {key: count for key, count in found.items() if key[0] == kind}
        total = sum(count * size(*key[1:]) for key, count in mine.items())
        lines.append(f"{kind:18} {sum(mine.values()):4} in all, {total} bytes")
    return "\n".join(lines) + "\n"


def path(case: str) -> Path:
    return FOLDER / f"{case.replace(' ', '_')}.txt"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        path(case).write_text(text(case))
