"""Writes tests/models/goldens/rewards.json: scores of the golden models as sequence classifiers with one label, and
tests/objectives/trl_reward.json: loss, gradients and metrics of TRL's RewardTrainer.

    python tests/tools/make_reward_goldens.py      (needs the `parity` extra: torch, transformers, TRL 1.16)

Trunks are those of make_model_goldens.py, drawn from their tensors' names (tests/models/golden_state.py); so is
`score.weight`.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import RewardTrainer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.models.golden_state import draw_tokens, drawn, stored  # noqa: E402

GOLDENS = ROOT / "tests" / "models" / "goldens"
CASES = json.loads((GOLDENS / "cases.json").read_text())
PAD = 98  # no golden row ends with it
# Configurations that `transformers` itself saves of its classifiers are kept of these, to be read by ours.
SAVED = ("smollm2", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "pythia")


def score(case):
    """(score of each row, the configuration as saved)."""
    fields = case["config"]
    arguments = {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(fields["model_type"], **arguments | {"num_labels": 1, "pad_token_id": PAD})
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    gemma = fields["model_type"].startswith("gemma")
    state = model.state_dict()
    heads = {"lm_head.weight", "embed_out.weight"}
    family, shapes = fields["model_type"], {name: tuple(value.shape) for name, value in state.items()}
    kept = {name for in_memory, shape in shapes.items() for name in stored(family, in_memory, shape)}
    assert kept - {"score.weight"} == set(case["shapes"]) - heads, kept ^ set(case["shapes"])
    model.load_state_dict(
        {name: torch.tensor(drawn(family, name, shape, gemma)) for name, shape in shapes.items()}
    )
    rows = draw_tokens(tuple(CASES["lengths"]), fields["vocab_size"])
    alone = {}
    for row in reversed(rows):  # shortest first, for dynamic rope
        with torch.no_grad():
            alone[len(row)] = model(torch.tensor(row[None].astype(np.int64))).logits.item()
    scores = [alone[len(row)] for row in rows]
    padded = np.full((len(rows), max(CASES["lengths"])), PAD, np.int64)
    for i, row in enumerate(rows):
        assert row[-1] != PAD
        padded[i, : len(row)] = row
    mask = np.arange(padded.shape[1]) < np.asarray(CASES["lengths"])[:, None]
    with torch.no_grad():
        together = model(torch.tensor(padded), attention_mask=torch.tensor(mask.astype(np.int64))).logits[
            :, 0
        ]
    if "dynamic" not in str(fields.get("rope_scaling")):
        np.testing.assert_allclose(together.numpy(), scores, atol=1e-5)
    saved = json.loads(config.to_json_string()) | {"architectures": [type(model).__name__]}
    return scores, saved


def loss(chosen, rejected, margin, centering):
    """TRL's loss of some pairs, its gradients by the scores, and its metrics; in float64."""
    scores = torch.tensor([*chosen, *rejected], dtype=torch.float64, requires_grad=True)
    inputs = {"attention_mask": torch.ones(len(scores), 3, dtype=torch.long)}
    if margin is not None:
        inputs["margin"] = torch.tensor(margin, dtype=torch.float64)
    identity = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=identity,
        args=SimpleNamespace(center_rewards_coefficient=centering),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    value = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    value.backward()
    names = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    metrics = {name: trainer._metrics["train"][name][0] for name in names}
    return {
        "margin": margin,
        "centering": centering,
        "loss": value.item(),
        "grad_chosen": scores.grad[: len(chosen)].tolist(),
        "grad_rejected": scores.grad[len(chosen) :].tolist(),
        "metrics": metrics,
    }


def main():
    found = {name: score(case) for name, case in CASES["cases"].items()}
    for name, (scores, _) in found.items():
        print(f"{name}: {np.round(scores, 3).tolist()}")
    document = {
        "scores": {name: scores for name, (scores, _) in found.items()},
        "saved_configs": {name: found[name][1] for name in SAVED},
    }
    (GOLDENS / "rewards.json").write_text(json.dumps(document) + "\n")
    chosen, rejected = [1.25, -0.5, 0.0, 3.0, -7.5], [0.5, 0.25, 0.0, -2.0, 6.0]
    margins = [0.0, 0.5, 1.0, 2.0, 0.25]
    cases = [loss(chosen, rejected, m, c) for m in (None, margins) for c in (None, 0.01, 0.5)]
    document = {"trl": trl.__version__, "chosen": chosen, "rejected": rejected, "cases": cases}
    (ROOT / "tests" / "objectives" / "trl_reward.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
