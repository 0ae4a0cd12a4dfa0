"""The stages of all points of a sweep: what points share runs once, what trains alike trains together, and what asks
critics and teachers asks them side by side."""

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from laif_jax.config import StudyConfig
from laif_jax.models import config as model_config
from laif_jax.models.model import resolve
from laif_jax.models.specs import param_specs
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.records.errors import LaifError
from laif_jax.stages.artifact import Peeked, peek
from laif_jax.studies.graph import Node, Outcome, broken, given, ordered, run_node
from laif_jax.training.together import Meeting, Member

logger = logging.getLogger(__name__)

TRAINED = ("pretrain", "sft", "dpo", "reward", "rejection")  # the stages that train by `training.loop.train`
ASKED = ("teach", "label", "evaluate", "agreement")  # wait for answers, and hold no model meanwhile
SMALL = 100_000_000  # weights; above, one model keeps an accelerator busy
BYTES = 32  # per weight and member: float32 weights, gradients and two moments, and one more copy of it all
SHARE = 0.25  # of the memory, for the members' states; the rest is for activations and everything else
MOST = 32


class SweepError(LaifError, ValueError):
    """A sweep cannot be run as it was asked for."""


# ---- how many at once --------------------------------------------------------------------------------------------


def members_at_once(configs: Sequence[StudyConfig], asked: int | None) -> tuple[int, str]:
    """(how many models train together at most, why).

    The rule: models of at most `SMALL` weights, up to `MOST`, as many as have their states (`BYTES` per weight) in
    `SHARE` of the memory of all devices. One by one with several processes, and with W&B, which follows one run at a
    time.

    Args:
      asked: `--together N`, or 1 for `--one-by-one`; it wins over the rule's number. None: by the rule.

    Raises:
      SweepError: several are asked for where that is not possible.
    """
    if asked == 1:
        return 1, "as asked"
    if reason := _impossible(configs):
        if asked:
            raise SweepError(f"--together {asked}: {reason}; leave the option out to run one by one")
        return 1, reason
    if asked:
        return asked, "as asked"
    weights = [weights_of(config) for config in configs]
    if any(count is None for count in weights):
        return 1, "how large the model is is not known before it is loaded; give --together N"
    largest = max(count for count in weights if count is not None)
    if largest > SMALL:
        return 1, f"a model of {largest:,} weights is not small (above {SMALL:,})"
    fitting = int(SHARE * memory_bytes() / (BYTES * max(1, largest)))
    return max(1, min(MOST, fitting)), f"a model of {largest:,} weights"


def _impossible(configs: Sequence[StudyConfig]) -> str:
    if jax.process_count() > 1:
        return f"there are {jax.process_count()} processes"
    return "`wandb` follows one run at a time" if any(config.wandb for config in configs) else ""


def weights_of(config: StudyConfig) -> int | None:
    """The number of weights of the model that is trained; None if that needs loading it (a GGUF file)."""
    spec = config.model
    if spec.source == "scratch":
        assert spec.scratch is not None  # checked when the configuration was read
        cfg = model_config.scratch(spec.scratch, len(load_tokenizer(spec.tokenizer or "")), eos_ids=(0,))
    else:
        source = resolve(spec.source)
        if source.endswith(".gguf"):
            return None
        cfg = model_config.from_hf(json.loads((epath.Path(source) / "config.json").read_text()))
    shapes = [leaf.shape for leaf in jax.tree.leaves(param_specs(cfg), is_leaf=lambda x: hasattr(x, "shape"))]
    return int(sum(np.prod(shape) for shape in shapes))


def memory_bytes() -> int:
    """Memory of all devices; on CPU that of the machine."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum((device.memory_stats() or {}).get("bytes_limit", 0) for device in devices)


# ---- running -----------------------------------------------------------------------------------------------------


def execute_points(
    targets: Sequence[tuple[Any, Iterable[Node]]], *, most: int, on_group: Callable[[int], Any] | None = None
) -> dict[Node, Outcome]:
    """Runs every node that the points need; as `graph.execute`, but training that is ready together runs together.

    Args:
      targets: per point what is compiled into its programs (points where it differs are never put into one group), and
        its nodes. most: models that train together; 1: one after the other.
      on_group: told how many members a group has.

    Returns:
      The outcome of each node. Points that share a stage each have their own node of it, and the same artifact.
    """
    static: dict[Node, Any] = {}
    for compiled, nodes in targets:
        for node in ordered(nodes):
            static.setdefault(node, compiled)
    run = _Execution(static, most, on_group)
    while run.waiting:
        run.next()
    return run.outcomes


class _Execution:
    """Where a sweep stands."""

    def __init__(self, static: Mapping[Node, Any], most: int, on_group: Callable[[int], Any] | None):
        self.static, self.most, self.on_group = static, most, on_group
        self.outcomes: dict[Node, Outcome] = {}
        self.waiting = list(static)
        self.count = len(self.waiting)
        self.peeked: dict[Node, Peeked | None] = {}

    def next(self) -> None:
        """Runs what is ready: everything but training, and, when that is all there is, training."""
        ready = [node for node in self.waiting if all(i in self.outcomes for i in node.inputs.values())]
        if self.most == 1:  # in the order of `laif run`: a point is finished before the next begins
            self._alone(ready[0])
        else:
            training = [node for node in ready if self._is(node, TRAINED)]
            asking = [node for node in ready if self._is(node, ASKED)]
            for node in ready:
                if node not in training and node not in asking:
                    self._alone(node)
            if asking:
                self._side_by_side(asking)
            elif len(training) == len(ready):
                self._side_by_side([n for n in training if self._group(n) == self._group(training[0])])
        self.waiting = [node for node in self.waiting if node not in self.outcomes]

    def _is(self, node: Node, kinds: Sequence[str]) -> bool:
        """Whether running the node means running an unfinished stage of one of these kinds."""
        if broken(node, self.outcomes):
            return False
        if node not in self.peeked:
            self.peeked[node] = peek(lambda: node.run(given(node, self.outcomes)))
        found = self.peeked[node]
        return found is not None and found.kind in kinds and not found.finished

    def _alone(self, node: Node) -> None:
        logger.info("[%d/%d] %s (seed %d)", len(self.outcomes) + 1, self.count, node.name, node.seed)
        self._end(node, run_node(node, self.outcomes))

    def _side_by_side(self, nodes: Sequence[Node]) -> None:
        """At most `most` stages, each once: what they train is trained together, and all wait at the same time."""
        stages: dict[Any, list[Node]] = {}
        for node in nodes:
            stages.setdefault(self._stage(node).folder, []).append(node)
        twins = list(stages.values())[: self.most]
        firsts = [same[0] for same in twins]
        kinds = ", ".join(dict.fromkeys(self._stage(node).kind for node in firsts))
        logger.info("[%d/%d] %s: %d stages", len(self.outcomes) + 1, self.count, kinds, len(firsts))
        calls = [functools.partial(run_node, node, self.outcomes) for node in firsts]
        for same, outcome in zip(twins, Meeting(self.most, self._tell).run(calls), strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            for node in same:
                self._end(node, outcome)

    def _stage(self, node: Node) -> Peeked:
        found = self.peeked[node]
        assert found is not None  # only stages that were found are trained together
        return found

    def _group(self, node: Node) -> tuple[str, Any]:
        return self._stage(node).kind, self.static[node]

    def _tell(self, members: Sequence[Member]) -> None:
        logger.info("%s: %d models in one step", members[0].run.title, len(members))
        if self.on_group:
            self.on_group(len(members))

    def _end(self, node: Node, outcome: Outcome) -> None:
        self.outcomes[node] = outcome
        if outcome.artifact is None:
            logger.error("%s (seed %d): %s", node.name, node.seed, outcome.error)
