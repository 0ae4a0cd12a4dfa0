"""This package's PPO as a contender: its compiled rollout and update on the same prompts.

Policy, reference, value and reward model have one shape and random weights. No token ends a response, so that every one
has the full length.
"""

import json
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from laif import config, model_options, peak_bytes
from serve import Block, serve

from laif_jax.config.rl import PpoSpec
from laif_jax.config.schema import MeshSpec, OptimizerSpec, SamplingSpec
from laif_jax.models.decoder import init_params
from laif_jax.parallel import make_mesh
from laif_jax.rollout.ppo import Prompts, RolloutConfig, ScorerConfig, auto_mesh, make_rollout
from laif_jax.training.optim import make_optimizer
from laif_jax.training.ppo import UpdateConfig, make_update
from laif_jax.training.ppo_plan import Numbers, iteration_key, make_layout, make_prompts, update_order
from laif_jax.training.state import create_state, state_shardings
from laif_jax.training.step import enable_compilation_cache

NO_EOS = np.array([-1], np.int32)


class Iterations:
    """The four models, and one compiled rollout and update of fixed shapes."""

    def __init__(self, job: dict[str, Any]):
        policy = config(job["shape"], job["sequence"])
        scalar = replace(policy, head="score")
        self.spec = PpoSpec(
            optimizer=OptimizerSpec(learning_rate=1e-6),
            batch_size=job["batch"],
            epochs=job["epochs"],
            minibatches=job["minibatches"],
            micro_batch=micro_batch(job["batch"] // job["minibatches"], job["sequence"]),
            sampling=SamplingSpec(temperature=0.7, max_new_tokens=job["new"], batch_size=job["batch"]),
        )
        self.job, self.count = job, 0
        self.mesh = auto_mesh(make_mesh(MeshSpec(), jax.devices()[:1]))
        self.layout = make_layout(self.spec, self.mesh, job["sequence"] - job["new"], job["new"])
        self.numbers = Numbers(self.spec, {"reward": 1.0})
        with open(job["work"]) as file:
            self.rows = [row["prompt"] for row in json.load(file)]
        self.make_models(policy, scalar)
        common: dict[str, Any] = {"dtype": job["dtype"]}
        self.rollout = make_rollout(
            RolloutConfig(
                policy,
                policy,
                job["new"],
                self.layout.decode_rows,
                self.layout.score_rows,
                value=scalar,
                scorers=(("reward", ScorerConfig(scalar)),),
                **common,
            ),
            self.mesh,
        )
        self.update = make_update(
            UpdateConfig(policy, scalar, **model_options(job)),
            self.optimizer,
            self.mesh,
            state_shardings(self.state),
        )

    def make_models(self, policy: Any, scalar: Any) -> None:
        """Those that are not trained are kept in the compute dtype."""
        dtype = jnp.dtype(self.job["dtype"])
        keys = jax.random.split(jax.random.key(0), 3)
        trained = {"policy": init_params(policy, keys[0]), "value": init_params(scalar, keys[1])}
        self.reference = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), trained["policy"])
        reward = {"params": init_params(scalar, keys[2], dtype), "mean": 0.0, "std": 1.0}
        self.scorers = {"reward": reward}
        self.optimizer = make_optimizer(self.spec.optimizer)
        self.state = create_state(trained, self.optimizer, mesh=self.mesh, donate=True)

    def prompts(self, index: int) -> Prompts:
        batch = self.job["batch"]
        start = index * batch % len(self.rows)
        rows = self.rows[start : start + batch]
        return make_prompts(self.layout, rows, 1, iteration_key(0, index), self.job["sequence"])

    def run(self) -> dict[str, float]:
        """One iteration; seconds of its parts.

        Raises:
          RuntimeError: something was not finite, or a response is too short.
        """
        index, self.count = self.count, self.count + 1
        prompts = self.prompts(index)
        models = {"reference": self.reference, "scorers": self.scorers} | self.state.params
        begin = time.perf_counter()
        rolled = jax.block_until_ready(self.rollout(models, prompts, NO_EOS, np.float32(0.7)))
        drawn = time.perf_counter()
        self.state, metrics = self.update(
            self.state,
            None,
            rolled,
            rolled.scores,
            np.ones(self.layout.padded, np.float32),
            update_order(self.spec, self.layout, 0, index),
            self.numbers.hyper(index, self.spec.kl.coef),
        )
        jax.block_until_ready(self.state)
        end = time.perf_counter()
        if not float(metrics["healthy"]) or int(rolled.counts.sum()) != self.job["batch"] * self.job["new"]:
            raise RuntimeError(f"iteration {index} went wrong: {metrics}")
        return {"rollout_seconds": drawn - begin, "update_seconds": end - drawn}


def micro_batch(rows: int, length: int) -> int:
    """Rows of one forward pass of the update: as many as keep the device busy, since their activations take memory."""
    tokens = 1024 if jax.default_backend() == "cpu" else 16384
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * length <= tokens))


def build(job: dict[str, Any]) -> Block:
    enable_compilation_cache(job["cache"])
    iterations = Iterations(job)
    steps = len(iterations.rows) // job["batch"]

    def block(passes: int) -> dict[str, float]:
        parts = [iterations.run() for _ in range(passes * steps or 1)]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    return block


if __name__ == "__main__":
    serve(build, peak_bytes())
