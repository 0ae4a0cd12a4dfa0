"""The compiled step sends what the golden files say, and never what only a silent replication would."""

import jax
import pytest

from tests.parallel import collectives
from tests.parallel.collectives import ACTIVATIONS, CASES, LENGTH, ROWS, VOCAB


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param, collectives.program(request.param)


def test_the_step_sends_what_the_golden_file_says_and_no_more(case, monkeypatch):
    name, program = case
    monkeypatch.setattr(collectives, "program", lambda _: program)
    golden, found = collectives.path(name).read_text(), collectives.text(name)
    for (kind, dtype, shape), count in collectives.collectives(program).items():
        # All devices' activations, or more: rows, length or vocabulary were brought together.
        assert collectives.size(dtype, shape) < ACTIVATIONS, (kind, dtype, shape, count)
    if golden.splitlines()[0] == f"# jax {jax.__version__}":
        assert found == golden, (
            "if it is meant to be: python -m tests.parallel.collectives, and read the diff"
        )


def test_logits_of_the_whole_vocabulary_or_of_all_tokens_are_nowhere(case):
    """Each device has its tokens by its part of the vocabulary, for one chunk at a time."""
    name, program = case
    tensor = CASES[name].get("tensor", 1)
    rows = ROWS * tensor // 8
    widths = [VOCAB] if tensor > 1 else []
    for width in widths:
        assert f"f32[{rows},{LENGTH},{width}]" not in program
        assert f"f32[{rows * LENGTH},{width}]" not in program
    assert f"f32[{ROWS},{LENGTH},{VOCAB}]" not in program
    assert f"f32[{rows * LENGTH},{VOCAB // tensor}]" not in program
