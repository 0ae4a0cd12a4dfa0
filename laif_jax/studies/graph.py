"""A study as a graph of stages: shared prefixes run once, a failure stops only what depends on it."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from laif_jax.labeling.errors import LabelError
from laif_jax.parallel.distributed import DistributedError
from laif_jax.stages.artifact import Artifact, StageError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One stage to run.

    Attributes:
      name: what a person reads: "sft weak 10%".
      run: takes the artifacts of `inputs`, by name, and returns the stage's own.
      arm: the arm it is run for, or "" if several share it.
    """

    name: str
    run: Callable[[Mapping[str, Artifact]], Artifact]
    inputs: Mapping[str, "Node"] = dataclasses.field(default_factory=dict)
    arm: str = ""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a node ended: an artifact, or a reason why there is none."""

    artifact: Artifact | None
    error: str = ""


def ordered(targets: Iterable[Node]) -> list[Node]:
    """All nodes that the targets need, inputs first, each once."""
    seen: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in seen:
            for dependency in node.inputs.values():
                visit(dependency)
            seen[node] = None

    for target in targets:
        visit(target)
    return list(seen)


def execute(
    targets: Iterable[Node], *, on_progress: Callable[[int, int, Node, Outcome | None], Any] | None = None
) -> dict[Node, Outcome]:
    """Runs every node that the targets need, one after the other.

    A stage that fails is reported and its dependants are skipped; the rest goes on. KeyboardInterrupt stops at once:
    finished stages keep their artifacts.

    Args:
      on_progress: called as (index, count, node, outcome): before a node (outcome None) and after it.
    """
    nodes = ordered(targets)
    outcomes: dict[Node, Outcome] = {}
    for index, node in enumerate(nodes):
        if on_progress:
            on_progress(index, len(nodes), node, None)
        outcomes[node] = run_node(node, outcomes)
        if on_progress:
            on_progress(index, len(nodes), node, outcomes[node])
    return outcomes


def broken(node: Node, outcomes: Mapping[Node, Outcome]) -> list[str]:
    """The names of a node's inputs that did not finish."""
    return [dependency.name for dependency in node.inputs.values() if outcomes[dependency].artifact is None]


def given(node: Node, outcomes: Mapping[Node, Outcome]) -> dict[str, Artifact]:
    """The artifacts of a node's inputs, by name."""
    found = {name: outcomes[dependency].artifact for name, dependency in node.inputs.items()}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def run_node(node: Node, outcomes: Mapping[Node, Outcome]) -> Outcome:
    """Runs a node whose inputs have been run; it is skipped if one of them did not finish."""
    if names := broken(node, outcomes):
        return Outcome(None, f"skipped: it needs `{names[0]}`, which did not finish")
    try:
        return Outcome(node.run(given(node, outcomes)))
    # A critic or a model that is not there is a LabelError, and a DistributedError in the processes other than 0.
    except (StageError, LabelError, DistributedError) as error:
        logger.error("%s failed: %s", node.name, error)
        return Outcome(None, str(error))
