"""One PPO iteration of TRL, for `python -m benchmarks.ppo --against trl`; run by an interpreter that has TRL 1.12.

TRL's own trainer runs as it is. Time is read where its functions begin: `batch_generation` draws, what follows until
advantages are whitened scores, and the rest of the step trains. No token ends a response.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Times of each iteration: begin, end of generation, end of scoring, end."""

    def __init__(self):
        self.now = []
        self.used = 0.0
        self.rows = []

    def watch(self):
        """Puts a clock around the trainer's generation and the whitening of advantages, which ends the scoring."""
        generation, whitening = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

        def generated(*args, **kwargs):
            self.used = time.process_time()
            self.now = [self.tick()]
            out = generation(*args, **kwargs)
            self.now.append(self.tick())
            return out

        def whitened(*args, **kwargs):
            self.now.append(self.tick())
            return whitening(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.masked_whiten = generated, whitened

    def on_step_end(self, args, state, control, **kwargs):
        begin, drawn, scored, end = [*self.now, self.tick()]
        self.rows.append(
            {
                "seconds": end - begin,
                "generate_seconds": drawn - begin,
                "score_seconds": scored - drawn,
                "update_seconds": end - scored,
                "cpu_seconds": time.process_time() - self.used,
            }
        )

    @staticmethod
    def tick():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def tokenizer(vocab):
    """Words w0, w1, ...; the trainer reads its padding id."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def build(options):
    """(policy, reference, value, reward) of one shape, with random weights."""
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=max(1, options.heads // 3),
        max_position_embeddings=options.prompt + options.new,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        num_labels=1,
    )
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    for model in (policy, reference):
        model.generation_config.eos_token_id = None
    value, reward = (LlamaForSequenceClassification(config) for _ in range(2))
    return policy, reference, value, reward


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("hidden", "layers", "heads", "vocab", "batch", "prompt", "new", "micro", "epochs", "repeat"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    options = parser.parse_args()
    micro = options.micro or options.batch
    iterations = options.repeat + 1
    rng = np.random.default_rng(0)
    rows = rng.integers(4, options.vocab, (options.batch * iterations, options.prompt)).tolist()
    data = Dataset.from_dict({"input_ids": rows})
    policy, reference, value, reward = build(options)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options.batch // micro,
            num_mini_batches=1,
            num_ppo_epochs=options.epochs,
            total_episodes=options.batch * iterations,
            local_rollout_forward_batch_size=options.batch,
            response_length=options.new,
            temperature=0.7,
            learning_rate=1e-6,
            num_sample_generations=0,
            gradient_checkpointing=False,
            report_to=[],
            logging_steps=1000,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=options.dtype == "bfloat16",
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer(options.vocab),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data.select(range(options.batch)),
            callbacks=[clock],
        )
        clock.watch()
        trainer.train()
        assert list(Path(folder).rglob("*.safetensors")) == []  # nothing was saved inside the measured time
    median = {name: statistics.median(row[name] for row in clock.rows[1:]) for name in clock.rows[0]}
    tokens = options.batch * options.new
    result = {"version": trl.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    result |= {name: round(value, 4) for name, value in median.items()}
    result |= {
        "tokens_per_second": round(tokens / median["seconds"], 1),
        "generated_per_second": round(tokens / median["generate_seconds"], 1),
        "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
