"""Writes tests/objectives/trl_ppo.json: what TRL's PPO trainer computes in one iteration of a tiny model.

Needs an environment of its own with torch and TRL 1.12, the last release that has PPO; the tests only read the file.
The trainer runs as it is; its functions are listened to. All responses have the full length: where TRL pads, it differs
on purpose (docs/reference/rl.md).

    python tests/tools/make_ppo_goldens.py
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

OUT = Path(__file__).parents[1] / "objectives" / "trl_ppo.json"
VOCAB, PROMPT = 13, 3
SETTINGS = {
    "num_ppo_epochs": 3,
    "num_mini_batches": 1,  # of two micro-batches; with more, TRL's metrics are means that count empty slots
    "response_length": 5,
    "kl_coef": 0.3,
    "cliprange": 0.02,
    "cliprange_value": 0.05,
    "vf_coef": 0.4,
    "gamma": 0.95,
    "lam": 0.9,
    "temperature": 0.7,
    "learning_rate": 0.02,
}
ROWS = 4


def listen(heard: dict[str, list[Any]], name: str, pick: Any = lambda args, out: out) -> None:
    """Keeps a copy of what the trainer's function `name` is called with, or gives."""
    original = getattr(ppo_trainer, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        value = pick(args, out)
        heard.setdefault(name, []).append([x.detach().clone() for x in value])
        return out

    setattr(ppo_trainer, name, called)


def run(estimator: str) -> dict[str, Any]:
    """One iteration; arrays as nested lists."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        num_labels=1,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    value, reward = (LlamaForSequenceClassification(config) for _ in range(2))
    with torch.no_grad():
        policy.lm_head.weight[0] = 0.0
        for model in (policy, reference):  # the padding token is never drawn
            model.generation_config.eos_token_id = None
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    names = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    data = Dataset.from_dict({"input_ids": torch.randint(4, VOCAB, (ROWS, PROMPT)).tolist()})
    heard: dict[str, list[Any]] = {}
    originals = {
        name: getattr(ppo_trainer, name) for name in ("selective_log_softmax", "get_reward", "masked_whiten")
    }
    listen(heard, "selective_log_softmax", lambda args, out: (args[1], out))
    listen(heard, "get_reward", lambda args, out: out[:2])
    listen(heard, "masked_whiten", lambda args, out: (args[0], out))
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=ROWS // 2,
                gradient_accumulation_steps=2,
                total_episodes=ROWS,
                num_sample_generations=0,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                kl_estimator=estimator,
                **SETTINGS,
            ),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **names),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data,
        )
        losses, predicted, logged, orders = [], [], {}, []
        backward, forward = trainer.accelerator.backward, ppo_trainer.forward
        permutation = ppo_trainer.np.random.permutation

        def listen_backward(loss: Any, **kwargs: Any) -> Any:
            losses.append(loss.item())
            return backward(loss, **kwargs)

        def listen_forward(model: Any, *args: Any) -> Any:
            out = forward(model, *args)
            if isinstance(out, tuple):
                predicted.append(out[1].detach()[:, PROMPT - 1 : -1, 0].tolist())
            return out

        def listen_permutation(count: int) -> Any:
            orders.append(permutation(count))
            return orders[-1]

        trainer.accelerator.backward, trainer.log = listen_backward, logged.update
        ppo_trainer.forward, ppo_trainer.np.random.permutation = listen_forward, listen_permutation
        trainer.train()
        ppo_trainer.forward, ppo_trainer.np.random.permutation = forward, permutation
    for name, original in originals.items():
        setattr(ppo_trainer, name, original)
    (responses, logps), (_, ref_logps), *updates = heard["selective_log_softmax"]
    assert not (responses == 0).any(), "a padding token was drawn; use another seed"
    (full_values, _), (_, scores) = heard["get_reward"]
    ((advantages, whitened),) = heard["masked_whiten"]
    rows = [order.reshape(2, -1) for order in orders]
    assert len(updates) == len(losses) == len(predicted) == 6
    return {
        "kl_estimator": estimator,
        "logps": logps.tolist(),
        "ref_logps": ref_logps.tolist(),
        "values": full_values[:, PROMPT - 1 : -1, 0].tolist(),
        "scores": scores.tolist(),
        "advantages": advantages.tolist(),
        "whitened": whitened.tolist(),
        "updates": [
            {"rows": part.tolist(), "logps": new.tolist(), "values": values, "loss": loss}
            for part, (_, new), values, loss in zip(
                [part for pair in rows for part in pair], updates, predicted, losses, strict=True
            )
        ],
        "metrics": {name: x for name, x in logged.items() if "/" in name},
    }


def main() -> None:
    document = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "settings": SETTINGS,
        "cases": [run(estimator) for estimator in ("k1", "k3")],
    }
    OUT.write_text(json.dumps(document) + "\n")
    print(f"wrote {OUT}: {[case['metrics'] for case in document['cases']]}")


if __name__ == "__main__":
    main()
