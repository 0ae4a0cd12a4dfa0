"""The graph of stages: order, sharing, and what a failure stops."""

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.studies.graph import Node, execute, ordered


def artifact(name: str) -> Artifact:
    return Artifact(epath.Path("/nowhere") / name, {"key": name, "metrics": {}})


class Chain:
    """Nodes that note when they ran and with what."""

    def __init__(self, broken: frozenset[str] = frozenset()):
        self.ran: list[str] = []
        self.broken = broken

    def node(self, name: str, **inputs: Node) -> Node:
        def run(given):
            self.ran.append(name)
            assert {key: value.key for key, value in given.items()} == {k: n.name for k, n in inputs.items()}
            if name in self.broken:
                raise StageError(f"{name} cannot go on: the disk is full")
            return artifact(name)

        return Node(name=name, run=run, inputs=inputs)


@st.composite
def shapes(draw):
    """For each node the earlier nodes that it needs."""
    count = draw(st.integers(1, 8))
    return [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(count)]


@given(shape=shapes(), broken=st.sets(st.integers(0, 7)))
def test_each_node_runs_once_after_its_inputs_and_a_failure_stops_only_its_dependants(shape, broken):
    chain = Chain(frozenset(f"n{i}" for i in broken))
    nodes: list[Node] = []
    for i, needs in enumerate(shape):
        nodes.append(chain.node(f"n{i}", **{f"input{j}": nodes[j] for j in needs}))
    outcomes = execute(nodes[::-1])

    assert set(outcomes) == set(nodes)
    assert len(chain.ran) == len(set(chain.ran))
    for i, needs in enumerate(shape):
        stopped = any(outcomes[nodes[j]].artifact is None for j in needs)
        outcome = outcomes[nodes[i]]
        assert (f"n{i}" in chain.ran) == (not stopped)
        if stopped:
            first = next(j for j in needs if outcomes[nodes[j]].artifact is None)
            assert outcome.error == f"skipped: it needs `n{first}`, which did not finish"
        elif i in broken:
            assert outcome.error == f"n{i} cannot go on: the disk is full"
        else:
            assert outcome.artifact is not None
            assert outcome.error == ""
            places = [chain.ran.index(f"n{j}") for j in needs]
            assert all(place < chain.ran.index(f"n{i}") for place in places)


def test_only_what_the_targets_need_is_ordered():
    chain = Chain()
    a = chain.node("a")
    b = chain.node("b", left=a)
    chain.node("unneeded", left=a)
    assert ordered([b, a]) == [a, b]


def test_two_nodes_of_one_name_are_two_nodes():
    chain = Chain()
    first, second = chain.node("same"), chain.node("same")
    execute([first, second])
    assert chain.ran == ["same", "same"]


def test_progress_is_told_before_and_after():
    chain = Chain(frozenset({"b"}))
    a = chain.node("a")
    b = chain.node("b", left=a)
    seen = []
    execute([b], on_progress=lambda i, n, node, outcome: seen.append((i, n, node.name, outcome)))
    assert [(i, n, name) for i, n, name, _ in seen] == [(0, 2, "a"), (0, 2, "a"), (1, 2, "b"), (1, 2, "b")]
    assert [outcome is None for *_, outcome in seen] == [True, False, True, False]
    assert "disk is full" in seen[-1][-1].error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_or_a_defect_stops_everything(error):
    def run(_):
        raise error

    chain = Chain()
    with pytest.raises(error):
        execute([Node(name="x", run=run), chain.node("after")])
    assert chain.ran == []
