"""Labels by people: a file out, a file in, and the same artifact as a critic's labels. And what rounds may spend."""

import json
from pathlib import Path

import pytest
from etils import epath

from laif_jax.config import EndpointSpec, IterateSpec
from laif_jax.records import Completion, Judgement, read_jsonl, write_jsonl
from laif_jax.stages import human, label, prompts
from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.stages.spend import over_bounds, spend_of
from laif_jax.worlds import symbols
from tests.studies import tiny


@pytest.fixture(scope="module")
def ctx(make):
    return make()


@pytest.fixture
def asked(ctx, tmp_path):
    """A run of the stage up to the wait for people: (prompts, samples, folder with the comparisons)."""
    given = prompts.run(ctx)
    rows = [row.prompt for row in prompts.read(given, "train")][:20]
    texts = [[symbols.solve(p.instruction), f"z{n}"] for n, p in enumerate(rows)]
    texts[19][1] = texts[19][0]  # equal: nobody is asked
    pairs = [
        Completion(prompt_id=p.id, generator="policy", text=texts[n][i], sample_index=i)
        for n, p in enumerate(rows)
        for i in (0, 1)
    ]
    path = epath.Path(tmp_path) / "samples"
    write_jsonl(path / "completions.jsonl.gz", pairs)
    samples = Artifact(path, {"key": tmp_path.name, "metrics": {}})
    with pytest.raises(StageError) as error:
        human.run(ctx, given, samples)
    message = str(error.value)
    assert "19 comparisons" in message
    assert "same command again" in message
    assert '"preference"' in message
    folder = next(
        Path(word.rstrip(".")).parent for word in message.split() if word.endswith("comparisons.jsonl.")
    )
    assert str(folder / "labels.jsonl") in message
    return given, samples, folder


def shown(folder: Path) -> list[dict]:
    return list(read_jsonl(folder / "comparisons.jsonl"))


def right(row: dict) -> int:
    """The preference of somebody who knows: 1 if a is the answer."""
    return 1 if row["a"] == symbols.solve(row["prompt"]) else 2


def test_people_see_both_sides_in_a_drawn_order(asked):
    rows = shown(asked[2])
    assert len(rows) == 19
    assert all(set(row) == {"id", "prompt", "a", "b"} for row in rows)
    assert {right(row) for row in rows} == {1, 2}  # the sample 0, always right, is not always a


def test_labels_become_what_a_critics_labels_are(ctx, asked):
    given, samples, folder = asked
    rows = shown(folder)
    write_jsonl(folder / "labels.jsonl", [{"id": row["id"], "preference": right(row)} for row in rows])
    made = human.run(ctx, given, samples)
    assert made.path.name.startswith("label-")
    found = label.read_preferences(made)
    assert len(found) == made.metrics["preferences"] == made.metrics["comparisons"] == 19
    for preference in found:
        assert preference.chosen.text == symbols.solve(preference.prompt.instruction)
        assert preference.p_chosen == 1.0
    judgements = [Judgement.from_row(row) for row in read_jsonl(made.path / "judgements.jsonl.gz")]
    assert {judgement.critic for judgement in judgements} == {"human"}
    assert {judgement.order for judgement in judgements} == {"ab", "ba"}
    # The same metrics as a critic's, so that reports read both.
    critics = label.run(ctx, given, samples, None, critic="strong")
    assert set(critics.metrics) <= set(made.metrics)
    assert {path.name for path in critics.path.iterdir()} == {path.name for path in made.path.iterdir()}
    assert human.run(ctx, given, samples).key == made.key


def test_several_labels_are_averaged_and_ties_and_probabilities_are_read(ctx, asked):
    given, samples, folder = asked
    rows = shown(folder)
    labels = [{"id": row["id"], "preference": right(row), "annotator": "x"} for row in rows]
    good = [1.0 if right(row) == 2 else 0.0 for row in rows]  # probability that b is better
    labels[0] = {"id": rows[0]["id"], "preference": 0}
    labels[1] = {"id": rows[1]["id"], "p_b": abs(good[1] - 0.2)}
    labels += [labels[2], {"id": rows[2]["id"], "preference": 3 - right(rows[2])}]
    labels += [{"id": rows[3]["id"], "preference": 3 - right(rows[3])}]
    write_jsonl(folder / "labels.jsonl", labels)
    made = human.run(ctx, given, samples)
    p = {preference.prompt.instruction: preference.p_chosen for preference in label.read_preferences(made)}
    assert rows[0]["prompt"] not in p  # a tie
    assert p[rows[1]["prompt"]] == pytest.approx(0.8)
    assert p[rows[2]["prompt"]] == pytest.approx(2 / 3)
    assert rows[3]["prompt"] not in p  # one against one
    ties = {tie.prompt.instruction: tie.p_chosen for tie in label.read_ties(made)}
    assert ties == {rows[0]["prompt"]: 0.5, rows[3]["prompt"]: 0.5}
    assert (made.metrics["tie"], made.metrics["labels"], made.metrics["duplicates"]) == (2, 22, 3)
    single = list(read_jsonl(made.path / "single_order_judgements.jsonl.gz"))
    assert len(single) == 22
    merged = next(j for j in read_jsonl(made.path / "judgements.jsonl.gz") if len(j["parts"]) == 3)
    assert set(merged["parts"]) <= {part["id"] for part in single}


def test_changed_labels_are_read_again(ctx, asked):
    given, samples, folder = asked
    rows = shown(folder)
    write_jsonl(folder / "labels.jsonl", [{"id": row["id"], "preference": right(row)} for row in rows])
    first = human.run(ctx, given, samples)
    write_jsonl(folder / "labels.jsonl", [{"id": row["id"], "preference": 3 - right(row)} for row in rows])
    second = human.run(ctx, given, samples)
    assert second.key != first.key
    assert all(p.rejected.text == symbols.solve(p.prompt.instruction) for p in label.read_preferences(second))


def test_missing_labels_are_counted_up_to_the_coverage_asked_for(ctx, asked):
    given, samples, folder = asked
    rows = shown(folder)
    write_jsonl(folder / "labels.jsonl", [{"id": row["id"], "preference": right(row)} for row in rows[:10]])
    with pytest.raises(StageError, match=rf"10 of 19.*9 are missing.*{rows[10]['id']}"):
        human.run(ctx, given, samples)
    write_jsonl(folder / "labels.jsonl", [{"id": row["id"], "preference": right(row)} for row in rows[:18]])
    made = human.run(ctx, given, samples)
    assert (made.metrics["missing"], made.metrics["preferences"]) == (1, 18)


@pytest.mark.parametrize(
    "row",
    [
        {"preference": 3},
        {"preference": True},
        {"preference": "1"},
        {"preference": 1.5},
        {"preference": [1]},
        {"p_b": 1.2},
        {"p_b": "0.5"},
        {"p_b": True},
        {"p_b": float("nan")},
        {"preference": 1, "p_b": 0.0},
        {},
        {"id": "0" * 16, "preference": 1},
        {"id": None, "preference": 1},
    ],
)
def test_what_is_no_label_is_named_by_line(ctx, asked, row):
    given, samples, folder = asked
    rows = shown(folder)
    lines = [{"id": rows[0]["id"], "preference": 1}, {"id": rows[1]["id"], **row}]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(StageError, match=r"labels\.jsonl, line 2"):
        human.run(ctx, given, samples)


def test_a_file_that_is_not_json_lines_is_named(ctx, asked):
    given, samples, folder = asked
    (folder / "labels.jsonl").write_text("id,preference\nx,1\n")
    with pytest.raises(StageError, match=r"labels\.jsonl, line 1: not valid JSON"):
        human.run(ctx, given, samples)


def test_only_ties_prefer_nothing(ctx, asked):
    given, samples, folder = asked
    write_jsonl(folder / "labels.jsonl", [{"id": row["id"], "preference": 0} for row in shown(folder)])
    with pytest.raises(StageError, match="prefers nothing"):
        human.run(ctx, given, samples)


# ---- spend -------------------------------------------------------------------------------------------------------

PAID = EndpointSpec(
    provider="openai", base_url="http://127.0.0.1:1/v1", prompt_price=10.0, completion_price=100.0
)
FREE = EndpointSpec.model_validate(tiny.TREE["endpoints"]["strong"])


def labelled(comparisons: int, prompt: int, completion: int) -> Artifact:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "cost": None}
    return Artifact(epath.Path("x"), {"key": "x", "metrics": {"comparisons": comparisons, "usage": usage}})


def test_what_was_spent_is_added_up_at_present_prices():
    rounds = [labelled(100, 10_000, 1_000), labelled(50, 20_000, 0)]
    assert spend_of(rounds, PAID) == {"comparisons": 150, "cost": pytest.approx(0.4)}
    assert spend_of(rounds, FREE) == {"comparisons": 150, "cost": 0.0}
    assert spend_of(rounds, None) == {"comparisons": 150, "cost": 0.0}
    unknown = PAID.model_copy(update={"prompt_price": None, "completion_price": None})
    assert spend_of(rounds, unknown) == {"comparisons": 150, "cost": None}
    assert spend_of([], PAID) == {"comparisons": 0, "cost": 0.0}


@pytest.mark.parametrize(
    ("bounds", "planned", "says"),
    [
        ({}, 10**6, ""),
        ({"max_comparisons": 250}, 100, ""),
        ({"max_comparisons": 249}, 100, "max_comparisons"),
        ({"max_cost": 0.81}, 100, ""),  # 0.40 spent; the last round's 0.004 per comparison
        ({"max_cost": 0.79}, 100, "max_cost"),
        ({"max_cost": 0.79}, 90, ""),
    ],
)
def test_a_round_that_would_pass_a_bound_is_not_begun(bounds, planned, says):
    rounds = [labelled(100, 10_000, 1_000), labelled(50, 20_000, 0)]
    reason = over_bounds(IterateSpec(**bounds), rounds, PAID, planned)
    assert (says in reason) if says else reason == ""


def test_the_first_round_is_forbidden_only_if_its_cost_could_not_be_known():
    spec = IterateSpec(max_cost=0.01)
    assert over_bounds(spec, [], PAID, 10**6) == ""
    unknown = PAID.model_copy(update={"prompt_price": None, "completion_price": None})
    assert "prompt_price" in over_bounds(spec, [], unknown, 1)
    assert over_bounds(IterateSpec(max_comparisons=5), [], PAID, 6)
