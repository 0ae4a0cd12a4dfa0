"""Writes tests/objectives/trl_losses.json: losses, gradients and metrics as TRL computes them.

Needs the `parity` extra (torch, TRL 1.16); the tests only read the file. It calls TRL's own `DPOTrainer._compute_loss`
and `CPOTrainer.cpo_loss` in float64, on trainers that hold nothing but the settings.

    python tests/tools/make_loss_goldens.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

OUT = Path(__file__).parents[1] / "objectives" / "trl_losses.json"

# Pairs: (log pi, log ref) summed over the tokens, tokens; of chosen and rejected. The last margin is far from 0.
PAIRS = [
    {"chosen": (-7.25, -8.5, 5), "rejected": (-9.0, -8.75, 7)},
    {"chosen": (-12.0, -10.0, 3), "rejected": (-6.5, -9.25, 2)},
    {"chosen": (-1.5, -1.5, 1), "rejected": (-2.0, -2.0, 4)},
    {"chosen": (-30.0, -28.0, 11), "rejected": (-41.0, -33.5, 9)},
    {"chosen": (-90.0, -20.0, 6), "rejected": (-15.0, -70.0, 8)},
]
# Our name -> TRL's, in the trainer that has it, with the settings to try.
DPO_CASES = [
    ("sigmoid", "sigmoid", {"beta": 0.1}),
    ("sigmoid", "sigmoid", {"beta": 2.0}),
    ("robust", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ("ipo_averaged", "ipo", {"beta": 0.4}),
    ("hinge", "hinge", {"beta": 0.2}),
    ("length_normalised", "sigmoid_norm", {"beta": 5.0}),
]
CPO_CASES = [  # TRL's CPO has no reference, so these are our reference-free losses
    ("simpo", "simpo", {"beta": 2.5, "gamma": 0.7}),
    ("conservative", "sigmoid", {"beta": 0.1, "label_smoothing": 0.15, "reference_free": 1.0}),
    ("ipo", "ipo", {"beta": 0.25, "reference_free": 1.0}),
    ("hinge", "hinge", {"beta": 0.2, "reference_free": 1.0}),
]


def dpo(
    pairs: list[dict[str, Any]], loss_types: list[str], weights: list[float], hyper: dict[str, float]
) -> Any:
    """TRL's DPO loss of some pairs, its gradients by the summed log-probs, and its metrics."""
    sides = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    length = max(tokens for *_, tokens in sides)
    mask = torch.zeros(len(sides), length + 1, dtype=torch.long)  # one prompt token first
    sums = torch.tensor([pi for pi, *_ in sides], dtype=torch.float64, requires_grad=True)
    for row, (*_, tokens) in enumerate(sides):
        mask[row, 1 : 1 + tokens] = 1
    shifted = mask[:, 1:].double()
    log_probs = shifted * (sums / shifted.sum(1))[:, None]
    outputs = SimpleNamespace(
        log_probs=log_probs,
        entropy=torch.zeros_like(log_probs),
        mean_logits=torch.zeros_like(log_probs),
        is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
    )
    reference = torch.tensor([ref for _, ref, _ in sides], dtype=torch.float64)
    ref_chosen, ref_rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=weights,
        beta=hyper["beta"],
        label_smoothing=hyper.get("label_smoothing", 0.0),
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    keep = ("rewards/", "logps/")
    metrics = {name: v[0] for name, v in trainer._metrics["train"].items() if name.startswith(keep)}
    grad_chosen, grad_rejected = sums.grad.chunk(2)
    return loss.item(), grad_chosen.tolist(), grad_rejected.tolist(), metrics


def cpo(pair: dict[str, Any], loss_type: str, hyper: dict[str, float]) -> Any:
    """TRL's CPO loss of one pair and its gradients by the summed log-probs."""
    (pi_c, _, tokens_c), (pi_r, _, tokens_r) = pair["chosen"], pair["rejected"]
    sums = torch.tensor([pi_c, pi_r], dtype=torch.float64, requires_grad=True)
    given = sums / torch.tensor([tokens_c, tokens_r]) if loss_type == "simpo" else sums
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        alpha=0.0,
        loss_type=loss_type,
        beta=hyper["beta"],
        simpo_gamma=hyper.get("gamma", 0.0),
        label_smoothing=hyper.get("label_smoothing", 0.0),
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, given[:1], given[1:])
    losses.sum().backward()
    return losses.item(), *sums.grad.tolist(), chosen.item(), rejected.item()


def main() -> None:
    cases = []
    for kind, name, hyper in DPO_CASES:
        rows = [dpo([pair], [name], [1.0], hyper) for pair in PAIRS]
        cases.append(
            {
                "kind": kind,
                "source": f"DPOTrainer {name}",
                "hyper": hyper,
                "loss": [row[0] for row in rows],
                "grad_chosen": [row[1][0] for row in rows],
                "grad_rejected": [row[2][0] for row in rows],
                "metrics": dpo(PAIRS, [name], [1.0], hyper)[3],
            }
        )
    hyper = {
        "beta": 0.1,
        "sft_weight": 0.3,
    }  # pair by pair: TRL's SFT term is one mean over the batch's tokens
    rows = [dpo([pair], ["sigmoid", "sft"], [1.0, 0.3], hyper) for pair in PAIRS]
    cases.append(
        {
            "kind": "sigmoid",
            "source": "DPOTrainer sigmoid + 0.3 sft",
            "hyper": hyper,
            "loss": [row[0] for row in rows],
            "grad_chosen": [row[1][0] for row in rows],
            "grad_rejected": [row[2][0] for row in rows],
            "metrics": {},
        }
    )
    for kind, name, hyper in CPO_CASES:
        rows = [cpo(pair, name, hyper) for pair in PAIRS]
        cases.append(
            {
                "kind": kind,
                "source": f"CPOTrainer {name}",
                "hyper": hyper,
                "loss": [row[0] for row in rows],
                "grad_chosen": [row[1] for row in rows],
                "grad_rejected": [row[2] for row in rows],
                "metrics": {
                    "rewards/chosen": sum(row[3] for row in rows) / len(rows),
                    "rewards/rejected": sum(row[4] for row in rows) / len(rows),
                },
            }
        )
    document = {"trl": trl.__version__, "torch": torch.__version__, "pairs": PAIRS, "cases": cases}
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {OUT}: {len(cases)} cases of {len(PAIRS)} pairs")


if __name__ == "__main__":
    main()
