"""What all contenders of a side-by-side run work on: one model shape, and the same tokens for everybody.

    python -m benchmarks.workload teachers/train.jsonl.gz > lengths.json

writes the lengths alone, for a machine that has neither the data nor a tokenizer: --data takes this file as well.
"""

import gzip
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; `tied`: input and output embeddings are one array."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def parameters(self) -> int:
        """All of them, norms and embeddings too."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def matrix_parameters(self) -> int:
        """Those that a token is multiplied with: without norms, and with the embedding once, as the output."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + self.vocab * self.hidden

    def forward_flops(self, length: int, *, words: bool = True) -> float:
        """Floating-point operations of one forward pass over a sequence: 2 per matrix parameter and token, and the
        causal half of attention's two products. `words`: with the output over the vocabulary."""
        attention = 2.0 * length**2 * self.heads * self.head_dim * self.layers
        used = self.matrix_parameters - (0 if words else self.vocab * self.hidden)
        return 2.0 * used * length + attention


SHAPES = {
    "smollm2-135m": Shape(49152, 576, 1536, 30, 9, 3, 64, True),
    "llama-1b": Shape(128256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-7b": Shape(32000, 4096, 11008, 32, 32, 32, 128, False),
}


def training_work(task: str, lengths: str, count: int, sequence: int, shape: Shape, data: Path | None) -> Any:
    """`count` examples of a training task, as lists of token ids.

    Args:
      task: "sft": {prompt, completion}; "dpo", "reward": {prompt, chosen, rejected}.
      lengths: "full": every row has `sequence` tokens, half of them the prompt of a pair; "real": those of `data`, a
        file like teachers/train.jsonl.gz, cut to `sequence`.
    """
    rng = random.Random(0)
    draw = lambda n: [rng.randrange(4, shape.vocab) for _ in range(n)]  # noqa: E731
    if lengths == "full":
        if task == "sft":
            return [{"prompt": draw(1), "completion": draw(sequence - 1)} for _ in range(count)]
        half = sequence // 2
        return [{"prompt": draw(half), "chosen": draw(half), "rejected": draw(half)} for _ in range(count)]
    assert data is not None  # checked on the command line
    sizes = real_lengths(data)
    rng.shuffle(sizes)
    rows = []
    for index in range(count):
        prompt, *answers = sizes[index % len(sizes)]
        prompt = max(1, min(prompt, sequence // 2))
        room = sequence - prompt
        cut = [max(1, min(n, room)) for n in answers]
        names = ("completion",) if task == "sft" else ("chosen", "rejected")
        rows.append({"prompt": draw(prompt)} | {name: draw(n) for name, n in zip(names, cut)})
    return rows


def real_lengths(path: Path) -> list[list[int]]:
    """[prompt, first answer, second answer] in tokens of each row that has two teachers' answers, by SmolLM2's
    tokenizer; of a `.json` file as they stand there."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    from laif_jax.models.model import resolve
    from laif_jax.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    rows = []
    with gzip.open(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            answers = [row["completions"].get(name) for name in ("gpt-3.5", "gpt-4")]
            if all(answers):
                rows.append([len(tokenizer(text).input_ids) for text in (row["prompt"], *answers)])
    if not rows:
        raise ValueError(f"{path}: no row has completions of both gpt-3.5 and gpt-4")
    return rows


def generation_work(lengths: str, count: int, prompt: int, new: int, shape: Shape) -> Any:
    """`count` prompts of `prompt` tokens; each may draw `new` tokens, or ("mixed") 8 to `new`, by a seed."""
    rng = random.Random(0)
    limit = lambda: new if lengths == "full" else rng.randint(min(8, new), new)  # noqa: E731
    return [
        {"prompt": [rng.randrange(4, shape.vocab) for _ in range(prompt)], "new": limit()}
        for _ in range(count)
    ]


def real_tokens(task: str, rows: Any) -> int:
    """Tokens of the work, padding apart; of generation those that are drawn."""
    if task in ("generate", "ppo"):
        return sum(row["new"] for row in rows)
    if task == "sft":
        return sum(len(row["prompt"]) + len(row["completion"]) for row in rows)
    return sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows)


def work_flops(task: str, rows: Any, shape: Shape, epochs: int = 1) -> float:
    """Operations that the work asks for: forward and backward pass over each sequence (the policy's alone for pairs),
    for generation one forward pass over each finished sequence, and for PPO that, the forward passes of reference,
    value and reward model, and `epochs` forward and backward passes of policy and value model."""
    if task in ("generate", "ppo"):
        lengths = [len(row["prompt"]) + row["new"] for row in rows]
        words = sum(map(shape.forward_flops, lengths))
        scalars = sum(shape.forward_flops(length, words=False) for length in lengths)
        return words if task == "generate" else 2 * words + 2 * scalars + 3 * epochs * (words + scalars)
    if task == "sft":
        return 3 * sum(shape.forward_flops(len(row["prompt"]) + len(row["completion"])) for row in rows)
    sides = [len(row["prompt"]) + len(row[side]) for row in rows for side in ("chosen", "rejected")]
    return 3 * sum(shape.forward_flops(length, words=task == "dpo") for length in sides)


if __name__ == "__main__":
    print(json.dumps(real_lengths(Path(sys.argv[1]))))
