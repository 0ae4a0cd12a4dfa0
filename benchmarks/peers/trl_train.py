"""TRL as a contender: its own trainers (SFT, DPO, reward) and `generate` of transformers, on the same tokens.

At its documented settings for speed that run on the machine: examples grouped by length where lengths differ, DPO's
reference log-probs computed beforehand, bfloat16 on a GPU. Packing is left out where there is no FlashAttention:
without it TRL's packed examples see each other.
"""

import json
import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from serve import Block, Inverted, serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

CUDA = torch.cuda.is_available()


def config(shape: dict[str, Any], length: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=max(2048, length),
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape["tied"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Every token is a word; the trainers want a tokenizer, though the work is token ids."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


class Gate(TrainerCallback):
    """Waits before each step, when all work of the steps before is done."""

    def __init__(self, gate: Any):
        self.gate = gate

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.gate()


def build(job: dict[str, Any]) -> Block:
    torch.manual_seed(0)
    with open(job["work"]) as file:
        rows = json.load(file)
    if job["task"] == "generate":
        return generation(rows, job)
    steps = len(rows) // job["batch"]
    run = Inverted(lambda gate: train(rows, job, gate))
    return lambda passes: run(passes * steps or 1)


def train(rows: Any, job: dict[str, Any], gate: Any) -> None:
    shape = job["shape"]
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": job["batch"],
        "max_steps": 10**6,
        "report_to": [],
        "logging_steps": 10**6,
        "save_strategy": "no",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_cpu": not CUDA,
        "bf16": job["dtype"] == "bfloat16",
        "gradient_checkpointing": job["remat"] != "none",
        "dataloader_pin_memory": CUDA,
        "max_length": job["sequence"],
        "disable_tqdm": True,
    }
    if job["lengths"] == "real" and job["task"] != "dpo":
        common["train_sampling_strategy"] = "group_by_length"
    words, callbacks = tokenizer(shape["vocab"]), [Gate(gate)]
    if job["task"] == "sft":
        from trl import SFTConfig, SFTTrainer

        examples = [{"input_ids": row["prompt"] + row["completion"]} for row in rows]
        trainer: Any = SFTTrainer(
            model=LlamaForCausalLM(config(shape, job["sequence"])),
            args=SFTConfig(**common),
            train_dataset=Dataset.from_list(examples),
            processing_class=words,
            callbacks=callbacks,
        )
    elif job["task"] == "dpo":
        from trl import DPOConfig, DPOTrainer

        # Ids are its own form of an example once it has tokenised it; words of the same ids give exactly them.
        text = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
        examples = [
            {
                "prompt": text(row["prompt"]),
                "chosen": " " + text(row["chosen"][:-1]),
                "rejected": " " + text(row["rejected"][:-1]),
            }
            for row in rows
        ]  # the trainer ends each answer with a token of its own
        trainer = DPOTrainer(
            model=LlamaForCausalLM(config(shape, job["sequence"])),
            args=DPOConfig(beta=0.1, precompute_ref_log_probs=True, **common),
            train_dataset=Dataset.from_list(examples),
            processing_class=words,
            callbacks=callbacks,
        )
    else:
        from trl import RewardConfig, RewardTrainer

        examples = [
            {
                "chosen_ids": row["prompt"] + row["chosen"],
                "rejected_ids": row["prompt"] + row["rejected"],
                "length": len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])),
            }
            for row in rows
        ]  # it groups by `length`, which it would drop as unused
        trainer = RewardTrainer(
            model=LlamaForSequenceClassification(config(shape, job["sequence"], num_labels=1)),
            args=RewardConfig(remove_unused_columns=False, **common),
            train_dataset=Dataset.from_list(examples),
            processing_class=words,
            callbacks=callbacks,
        )
    trainer.train()


def generation(rows: Any, job: dict[str, Any]) -> Block:
    model = LlamaForCausalLM(config(job["shape"], job["sequence"])).eval()
    if CUDA:
        model = model.cuda()
    if job["dtype"] == "bfloat16":
        model = model.bfloat16()

    def some(start: int) -> None:
        batch = rows[start : start + job["batch"]]
        prompts = torch.tensor([row["prompt"] for row in batch], device=model.device)
        new = max(row["new"] for row in batch)
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=0.7,
                top_k=0,
            )

    def block(passes: int) -> None:
        for _ in range(max(1, passes)):
            for start in range(0, len(rows) if passes else job["batch"], job["batch"]):
                some(start)
        if CUDA:
            torch.cuda.synchronize()

    return block


if __name__ == "__main__":
    serve(build, torch.cuda.max_memory_allocated if CUDA else None)
