"""Seconds of one PPO iteration: python -m benchmarks.ppo [--json] [--against trl --trl-python PATH].

Policy, reference, value and reward model are Llamas of SmolLM2-135M's shape with random weights. An iteration draws a
fixed number of tokens for every prompt, scores them with all four models, and trains policy and value model with PPO.
The first iteration compiles and is told apart. `--against trl` runs TRL's PPO on the same shapes in its own virtual
environment (TRL 1.12 is the last release that has it) and gives the ratio: above 1, this package is faster.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax.config.rl import PpoSpec
from laif_jax.config.schema import MeshSpec, OptimizerSpec, SamplingSpec, ScratchSpec
from laif_jax.models.config import scratch
from laif_jax.models.decoder import init_params
from laif_jax.parallel import make_mesh
from laif_jax.rollout.ppo import Prompts, RolloutConfig, ScorerConfig, auto_mesh, make_rollout
from laif_jax.training.optim import make_optimizer
from laif_jax.training.ppo import UpdateConfig, make_update
from laif_jax.training.ppo_plan import Layout, Numbers, iteration_key, make_prompts, update_order
from laif_jax.training.state import create_state, state_shardings
from laif_jax.training.step import enable_compilation_cache

NO_EOS = np.array([-1], np.int32)  # no token ends a response, so that every one has the full length
PEER = Path(__file__).parent / "peers" / "trl_ppo.py"
SHAPES = {"hidden": 576, "layers": 30, "heads": 9, "vocab": 49152, "batch": 16, "prompt": 64, "new": 64}
NUMBERS = SHAPES | {"micro": 0, "epochs": 4, "repeat": 3}


class Iteration:
    """The models, and one compiled rollout and update, of a PPO iteration of fixed shapes."""

    def __init__(self, options: argparse.Namespace):
        sizes = ScratchSpec(
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 8 // 3,
            num_layers=options.layers,
            num_heads=options.heads,
            num_kv_heads=max(1, options.heads // 3),
            max_position=options.prompt + options.new,
        )
        policy = scratch(sizes, options.vocab)
        scalar = replace(policy, head="score")
        micro = options.micro or options.batch
        self.spec = PpoSpec(
            optimizer=OptimizerSpec(learning_rate=1e-6),
            batch_size=options.batch,
            epochs=options.epochs,
            micro_batch=micro,
            sampling=SamplingSpec(temperature=0.7, max_new_tokens=options.new, batch_size=options.batch),
        )
        self.layout = Layout(
            options.batch, options.batch, options.prompt, options.new, micro, options.batch, micro
        )
        self.numbers, self.options = Numbers(self.spec, {"reward": 1.0}), options
        self.mesh = auto_mesh(make_mesh(MeshSpec(), jax.devices()[:1]))
        self.models(policy, scalar)
        common: dict[str, Any] = {"dtype": options.dtype, "chunk": options.chunk}
        self.rollout = make_rollout(
            RolloutConfig(
                policy,
                policy,
                options.new,
                options.batch,
                micro,
                value=scalar,
                scorers=(("reward", ScorerConfig(scalar)),),
                **common,
            ),
            self.mesh,
        )
        self.update = make_update(
            UpdateConfig(policy, scalar, **common), self.optimizer, self.mesh, state_shardings(self.state)
        )

    def models(self, policy: Any, scalar: Any) -> None:
        """Four random models; those that are not trained are kept in the compute dtype."""
        dtype = jnp.dtype(self.options.dtype)
        keys = jax.random.split(jax.random.key(0), 3)
        trained = {"policy": init_params(policy, keys[0]), "value": init_params(scalar, keys[1])}
        self.parameters = sum(x.size for x in jax.tree.leaves(trained["policy"]))
        self.reference = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), trained["policy"])
        reward = {"params": init_params(scalar, keys[2], dtype), "mean": 0.0, "std": 1.0}
        self.scorers = {"reward": reward}
        self.optimizer = make_optimizer(self.spec.optimizer)
        self.state = create_state(trained, self.optimizer, mesh=self.mesh, donate=True)

    def roll(self, prompts: Prompts) -> Any:
        """A finished rollout."""
        models = {"reference": self.reference, "scorers": self.scorers} | self.state.params
        temperature = np.float32(self.spec.sampling.temperature)
        return jax.block_until_ready(self.rollout(models, prompts, NO_EOS, temperature))

    def prompts(self, index: int) -> Prompts:
        rng = np.random.default_rng(index)
        tokens = rng.integers(4, self.options.vocab, (self.options.batch, self.options.prompt)).tolist()
        longest = self.options.prompt + self.options.new
        return make_prompts(self.layout, tokens, 1, iteration_key(0, index), longest)

    def run(self, index: int) -> dict[str, float]:
        """Seconds of the parts of iteration `index`, and its metrics that tell whether it did what it should."""
        prompts = self.prompts(index)
        begin, used = time.perf_counter(), time.process_time()
        rolled = self.roll(prompts)
        drawn = time.perf_counter()
        self.state, metrics = self.update(
            self.state,
            None,
            rolled,
            rolled.scores,
            np.ones(self.options.batch, np.float32),
            update_order(self.spec, self.layout, 0, index),
            self.numbers.hyper(index, self.spec.kl.coef),
        )
        jax.block_until_ready(self.state)
        end, used = time.perf_counter(), time.process_time() - used
        # Rows that may draw nothing pay for the same scoring, and for no decoding.
        self.roll(prompts._replace(limits=np.zeros_like(prompts.limits)))
        scored = time.perf_counter() - end
        if not float(metrics["healthy"]) or int(rolled.counts.sum()) != self.options.batch * self.options.new:
            raise RuntimeError(f"iteration {index} went wrong: {metrics}")
        return {
            "seconds": end - begin,
            "generate_seconds": drawn - begin - scored,
            "score_seconds": scored,
            "update_seconds": end - drawn,
            "cpu_seconds": used,
        }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark: medians over `repeat` iterations after the first. Scoring includes one prefill; `cpu_seconds`
    is the time of all this process's threads, which says more than `seconds` on a machine that others use too."""
    enable_compilation_cache()
    iteration = Iteration(options)
    first, *later = [iteration.run(index) for index in range(options.repeat + 1)]
    median = {name: statistics.median(run[name] for run in later) for name in first}
    tokens = options.batch * options.new
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": options.dtype,
        "parameters": iteration.parameters,
        **{name: getattr(options, name) for name in (*SHAPES, "epochs")},
        "compile_seconds": round(first["seconds"] - median["seconds"], 2),
        **{name: round(value, 4) for name, value in median.items()},
        "tokens_per_second": round(tokens / median["seconds"], 1),
        "generated_per_second": round(tokens / max(median["generate_seconds"], 1e-9), 1),
        "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def measure_trl(options: argparse.Namespace) -> dict[str, Any]:
    """TRL's figures for the same shapes, from its own interpreter.

    Raises:
      RuntimeError: its process failed; the message ends with what it said.
    """
    names = (*SHAPES, "micro", "epochs", "repeat", "dtype")
    command = [str(options.trl_python), str(PEER)]
    command += [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL's benchmark failed ({' '.join(command)}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens whose logits exist at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--against", choices=("trl",), help="also run this peer, and give the ratio")
    parser.add_argument("--trl-python", type=Path, help="the interpreter of an environment with TRL 1.12")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    if options.against and not (options.trl_python and options.trl_python.exists()):
        parser.error(
            "--against trl needs --trl-python PATH, the interpreter of an environment made by: "
            "python3 -m venv trl && trl/bin/pip install trl==1.12.0 torch"
        )
    if options.batch % (options.micro or options.batch):
        parser.error(f"--batch {options.batch} is not a multiple of --micro {options.micro}")
    peer = measure_trl(options) if options.against else None  # first, so that both have the whole machine
    result = measure(options)
    if peer:
        ratios = {
            name: round(peer[name] / result[name], 2)
            for name in ("seconds", "generate_seconds", "score_seconds", "update_seconds", "cpu_seconds")
        }
        result |= {"trl": peer, "ratio": ratios.pop("seconds"), "ratios": ratios}
    print(json.dumps(result) if options.json else "\n".join(f"{k:22} {v}" for k, v in result.items()))


if __name__ == "__main__":
    sys.exit(main())
