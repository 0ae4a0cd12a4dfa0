"""The one reader of files of pairs: every format, and what it says of a bad row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.config.label import PairFile
from laif_jax.labeling.pair_files import read_pairs
from laif_jax.records import DataError, write_json, write_jsonl, write_parquet

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?", "name": "Ann"}]


def test_texts_messages_and_whole_comparisons(tmp_path) -> None:
    rows = [
        {"prompt": "Hi?", "a": "x", "b": 7, "human": [1, 1, 2], "model_a": "m", "source": "s"},
        {"prompt": CHAT, "a": "x", "b": True, "human": 0, "quality_a": 0.25, "quality_b": 1},
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    first, second = read_pairs(tmp_path / "pairs.jsonl")
    assert (first.human, first.source, first.comparison.b.text) == ((1, 1, 2), "s", "7")
    assert first.p_b == pytest.approx(1 / 3)
    assert first.row == rows[0]
    assert (first.comparison.a.generator, first.comparison.b.generator) == ("m", "b")
    assert [m.role for m in second.comparison.prompt.messages] == ["system", "user"]
    assert second.comparison.b.text == "True"
    assert (second.human, second.p_b) == ((0,), 0.5)
    assert [side.meta for side in (second.comparison.a, second.comparison.b)] == [
        {"quality": 0.25},
        {"quality": 1.0},
    ]
    write_jsonl(tmp_path / "whole.jsonl.gz", [second.comparison.to_row()])
    assert read_pairs(tmp_path / "whole.jsonl.gz")[0].comparison == second.comparison


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_other_names_of_columns_in_every_kind_of_file(tmp_path, ending: str) -> None:
    rows = [
        {"instruction": "Q", "output_1": "x", "output_2": "y", "generator_1": "one", "generator_2": "two", "p": p}
        for p in (0.25, None, 0.5)
    ]  # fmt: skip
    path = tmp_path / f"pairs.{ending}"
    write = {"json": write_json, "parquet": write_parquet}.get(ending, write_jsonl)
    write(path, rows)
    spec = PairFile(path=str(path), prompt="instruction", a="output_1", b="output_2", label="p")
    found = read_pairs(spec)
    assert [(pair.p_b, pair.human) for pair in found] == [(0.25, (1,)), (None, ()), (0.5, (0,))]
    assert (found[0].comparison.a.generator, found[0].comparison.b.generator) == ("one", "two")
    assert len(read_pairs(spec.model_copy(update={"limit": 2}))) == 2


def test_labels_as_winners_of_a_named_column(tmp_path) -> None:
    rows = [{"prompt": "Q", "a": "x", "b": "y", "vote": vote} for vote in (1, 2, 0, [2, 2, 1], [], None)]
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, {"prompt": "Q", "a": "x", "b": "y"}])
    found = read_pairs(PairFile(path=str(tmp_path / "pairs.jsonl"), label="vote", label_kind="winner"))
    assert [pair.p_b for pair in found] == [0.0, 1.0, 0.5, pytest.approx(2 / 3), None, None, None]
    assert [pair.human for pair in found] == [(1,), (2,), (0,), (2, 2, 1), (), (), ()]


@given(st.lists(st.sampled_from([0, 1, 2]), max_size=6))
def test_a_label_is_the_mean_of_its_votes(tmp_path_factory, votes) -> None:
    path = tmp_path_factory.mktemp("votes") / "pairs.jsonl"
    write_jsonl(path, [{"prompt": "Q", "a": "x", "b": "y", "human": votes}])
    (pair,) = read_pairs(path)
    assert pair.human == tuple(votes)
    if votes:
        assert pair.p_b == pytest.approx((votes.count(2) + votes.count(0) / 2) / len(votes))
    else:
        assert pair.p_b is None


GOOD = {"prompt": "x", "a": "y", "b": "z"}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": "x", "a": "y"}, "no column b; there are prompt, a. .*pairs.b"),
        ({**GOOD, "b": None}, "b is null, not a text. Mend"),
        ({**GOOD, "b": ["z"]}, "b is a list, not a text"),
        ({**GOOD, "prompt": {"role": "user"}}, "prompt is a dict, not a text"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "prompt is no prompt .*content.*`role`"),
        ({**GOOD, "prompt": [{"role": "tool", "content": "x"}]}, "prompt is no prompt .*role"),
        ({**GOOD, "prompt": [{"role": "system", "content": "x"}]}, "prompt is no prompt .*user"),
        ({**GOOD, "human": [3]}, r"human is \[3\]. Labels are 1 \(a is better\)"),
        ({**GOOD, "human": [[1]]}, "human is .* Labels are 1"),
        ({**GOOD, "quality_b": "good"}, "quality_b is 'good'; give a number"),
        ({**GOOD, "a": {"text": "y"}, "b": {"text": "z"}}, "no comparison as this package writes them"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_what_to_do(tmp_path, bad, says) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [GOOD, bad])
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # an empty line counts
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 3: {says}"):
        read_pairs(path)


def test_a_wrong_kind_of_label_and_a_column_that_is_not_there_are_told(tmp_path) -> None:
    path = str(tmp_path / "pairs.json")
    write_json(path, [{**GOOD, "winner": 2}])
    with pytest.raises(DataError, match=r"row 1: winner is 2. .*label_kind: winner"):
        read_pairs(PairFile(path=path, label="winner"))
    with pytest.raises(DataError, match=r"names the column truth, which no row has; there are prompt, a, b"):
        read_pairs(PairFile(path=path, label="truth"))
    assert len(read_pairs(PairFile(path=path, label="truth"), labels=False)) == 1
    write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="no rows"):
        read_pairs(tmp_path / "empty.jsonl")


def test_a_random_sample_keeps_the_order_of_the_file(tmp_path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{**GOOD, "prompt": f"Q{i:02}"} for i in range(20)])
    found = [p.comparison.prompt.instruction for p in read_pairs(tmp_path / "p.jsonl", limit=5, seed=1)]
    assert found == sorted(found)
    assert found != [
        p.comparison.prompt.instruction for p in read_pairs(tmp_path / "p.jsonl", limit=5, seed=2)
    ]
