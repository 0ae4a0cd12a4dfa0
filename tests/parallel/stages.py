"""Stages of a study on whatever mesh there is, by their numbers: the same on one device, on eight, and on two processes
of four. `worker.py` runs them in several processes, `test_stages.py` in one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from laif_jax.config.rl import RewardSpec
from laif_jax.models.config import ModelConfig, from_hf
from laif_jax.models.decoder import init_params
from laif_jax.models.reward import change_head
from laif_jax.models.specs import param_specs
from laif_jax.parallel import param_shardings, row_shard
from laif_jax.rollout.ppo import ScorerConfig
from laif_jax.training.ppo_loop import run_ppo
from laif_jax.training.ppo_models import Scorer
from laif_jax.training.reward_task import reward_task
from laif_jax.training.tasks import sft_task
from tests.training import ppo_small, small

REWARD = RewardSpec(steps=1, centering=0.1)


def mixtral() -> ModelConfig:
    return from_hf(
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "vocab_size": small.VOCAB,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "max_position_embeddings": 64,
            "router_aux_loss_coef": 0.1,
        }
    )


def born(cfg: ModelConfig, on: Mesh, seed: int = 0) -> dict[str, Any]:
    """Parameters on the mesh, each device's part by itself."""
    return init_params(cfg, jax.random.key(seed), shardings=param_shardings(param_specs(cfg), on))


def part(batch: dict[str, np.ndarray], on: Mesh) -> dict[str, np.ndarray]:
    """The rows of a batch [A, rows, ...] that this process loads."""
    index, count = row_shard(on)
    return {name: np.split(array, count, axis=1)[index] for name, array in batch.items()}


def mixtral_sft(on: Mesh) -> dict[str, float]:
    """One SFT update of a mixture of experts, with its router loss."""
    task = sft_task(mixtral(), small.SFT, **small.F32)
    _, metrics = small.update(task, part(small.sft_batch(), on), on, params=born(task.cfg, on))
    return {name: float(value) for name, value in metrics.items()}


def reward(on: Mesh) -> dict[str, float]:
    """One update of a reward model."""
    cfg, params = change_head(
        small.config(), born(small.config(), on), "score", key=jax.random.key(1), mesh=on
    )
    task = reward_task(cfg, REWARD, **small.F32)
    batch = {name: array for name, array in small.pair_batch().items() if not name.startswith("ref_")}
    _, metrics = small.update(task, part(batch, on), on, params=params)
    return {name: float(value) for name, value in metrics.items()}


def ppo(on: Mesh, out: Path) -> list[dict[str, float]]:
    """Two iterations of PPO: responses are drawn, scored by a reward model on the devices and a function on the host,
    valued, and learned from; the metrics of each."""
    options = ppo_small.spec(iterations=2, epochs=2, save_every=0, log_every=1)
    cfg = ppo_small.config()
    policy = born(cfg, on)
    score_cfg = dataclasses.replace(cfg, head="score")
    scorer = Scorer(ScorerConfig(score_cfg), born(score_cfg, on, seed=7))
    models = ppo_small.build_models(
        options, cfg, policy, mesh=on, key=jax.random.key(1), scorers={"model": scorer}
    )
    task = ppo_small.task(weights={"model": 1.0, "sevens": 1.0})
    result = run_ppo(options, models, task, out, seed=0, progress=False)
    unlike = ("timing_s/", "perf/", "eps", "time")
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(unlike) and isinstance(value, float | int)
        }
        for row in result.history
    ]
