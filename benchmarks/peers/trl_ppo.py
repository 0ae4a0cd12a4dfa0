"""TRL's PPO as a contender; run by an interpreter that has TRL 1.12, the last release with PPO.

TRL's own trainer runs as it is, and waits where an iteration begins. What its part up to the whitening of advantages
takes is the rollout (drawing and scoring), the rest the update. No token ends a response.
"""

import json
import os
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from serve import Block, Inverted, serve
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_train import CUDA, config, tokenizer


class Clock(TrainerCallback):
    """Seconds of the rollouts and updates since it was last asked."""

    def __init__(self, gate: Any):
        self.gate, self.parts = gate, {"rollout_seconds": 0.0, "update_seconds": 0.0}
        self.begin = self.scored = 0.0

    def watch(self) -> None:
        """Waits before the trainer draws, and looks at the clock when it whitens advantages, which ends the scoring."""
        generation, whitening = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

        def generated(*args: Any, **kwargs: Any) -> Any:
            tick()
            self.gate()
            self.begin = tick()
            return generation(*args, **kwargs)

        def whitened(*args: Any, **kwargs: Any) -> Any:
            self.scored = tick()
            return whitening(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.masked_whiten = generated, whitened

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.parts["rollout_seconds"] += self.scored - self.begin
        self.parts["update_seconds"] += tick() - self.scored

    def take(self) -> dict[str, float]:
        taken, self.parts = self.parts, dict.fromkeys(self.parts, 0.0)
        return taken


def tick() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def make_models(job: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """(policy, reference, value, reward) of one shape, with random weights."""
    made = config(job["shape"], job["sequence"], num_labels=1)
    made.eos_token_id = None
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(made), LlamaForCausalLM(made)
    reference.load_state_dict(policy.state_dict())
    for model in (policy, reference):
        model.generation_config.eos_token_id = None
    value, reward = (LlamaForSequenceClassification(made) for _ in range(2))
    return policy, reference, value, reward


def train(rows: Any, job: dict[str, Any], clock: Clock) -> None:
    batch = job["batch"]
    data = Dataset.from_dict({"input_ids": [row["prompt"] for row in rows]})
    policy, reference, value, reward = make_models(job)
    clock.watch()
    PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,  # it splits this into the minibatches, an update each
            num_mini_batches=job["minibatches"],
            num_ppo_epochs=job["epochs"],
            total_episodes=batch * 10**6,
            local_rollout_forward_batch_size=batch,
            response_length=job["new"],
            temperature=0.7,
            learning_rate=1e-6,
            num_sample_generations=0,
            gradient_checkpointing=job["remat"] != "none",
            report_to=[],
            logging_steps=10**6,
            save_strategy="no",
            use_cpu=not CUDA,
            bf16=job["dtype"] == "bfloat16",
        ),
        processing_class=tokenizer(job["shape"]["vocab"]),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(batch)),
        callbacks=[clock],
    ).train()


def build(job: dict[str, Any]) -> Block:
    with open(job["work"]) as file:
        rows = json.load(file)
    steps = len(rows) // job["batch"]
    clock = Clock(None)

    def begin(gate: Any) -> None:
        clock.gate = gate
        train(rows, job, clock)

    run = Inverted(begin)

    def block(passes: int) -> dict[str, float]:
        run(passes * steps or 1)
        return clock.take()

    return block


if __name__ == "__main__":
    serve(build, torch.cuda.max_memory_allocated if CUDA else None)
