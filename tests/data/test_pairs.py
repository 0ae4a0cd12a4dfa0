"""Pairs of responses: read from every form, bad rows counted by reason, split by prompt, tokenised."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.config.rl import RewardSpec
from laif_jax.config.schema import PairSource
from laif_jax.data.pairs import (
    Pair,
    encode_pairs,
    from_preferences,
    load_pairs,
    split_by_prompt,
    training_pairs,
    without_prompts,
)
from laif_jax.data.pipeline import preference_batches
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.records import Completion, DataError, Preference, Prompt, write_jsonl

HH = {"prompt": None, "a": "chosen", "b": "rejected", "label": None}


def source(folder: Path, rows, **fields) -> PairSource:
    write_jsonl(folder / "pairs.jsonl", rows)
    return PairSource(path=str(folder / "pairs.jsonl"), **fields)


# ---- forms -----------------------------------------------------------------------------------------------------


def test_probabilities_groups_and_margins(tmp_path) -> None:
    rows = [
        {"prompt": "p", "a": "x", "b": "y", "p_b": 0.25, "who": "gpt", "gap": 3, "kind": 1},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "a": 7,
            "b": True,
            "p_b": 1,
            "who": "me",
            "gap": 0.5,
            "kind": 2,
        },
    ]
    one, two = sorted(
        load_pairs(source(tmp_path, rows, group=["who", "kind"], margin="gap")), key=lambda pair: pair.p_b
    )
    assert (one.prompt.instruction, one.a, one.b, one.p_b, one.margin) == ("p", "x", "y", 0.25, 3.0)
    assert one.groups == {"who": "gpt", "kind": "1"}
    assert (two.a, two.b, two.chosen_is_b) == ("7", "True", True)
    assert PairSource(path="x", group="who").group == ("who",)


def test_winners_and_lists_of_votes(tmp_path) -> None:
    votes = [1, 2, 0, [2, 2, 1], [1, 2], [0, 0, 2], []]
    rows = [{"prompt": f"p{i}", "a": "x", "b": "y", "human": vote} for i, vote in enumerate(votes)]
    found = load_pairs(source(tmp_path, rows, label="human", label_kind="winner"))
    by_prompt = {pair.prompt.instruction: pair.p_b for pair in found}
    assert by_prompt == pytest.approx({"p0": 0.0, "p1": 1.0, "p2": 0.5, "p3": 2 / 3, "p4": 0.5, "p5": 2 / 3})
    assert found.report.no_label == 1
    assert found.report.ties == 2


def test_whole_dialogues_are_split_at_the_last_assistant_turn(tmp_path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a\n\nHuman: b"
    rows = [
        {
            "chosen": f"{start}\n\nAssistant: good \n\nwith a blank line",
            "rejected": f"{start}\n\nAssistant: bad",
        },
        {"chosen": f"{start}!\n\nAssistant: good", "rejected": f"{start}\n\nAssistant: bad"},
        {"chosen": f"{start}\n\nAssistant: x\n\nHuman: more", "rejected": f"{start}\n\nAssistant: bad"},
        {"chosen": f"{start}\n\nAssistant:", "rejected": f"{start}\n\nAssistant: bad"},
    ]
    found = load_pairs(source(tmp_path, rows, **HH))
    assert len(found) == 1
    pair = found[0]
    assert [(m.role, m.content) for m in pair.prompt.messages] == [
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "a\n\nb"),  # one speaker's two turns: chat templates want them to alternate
    ]
    assert (pair.a, pair.b, pair.p_b) == ("good \n\nwith a blank line", "bad", 0.0)
    assert found.report.dropped == {"empty": 1, "different_prompts": 1, "no_response": 1}


def test_lists_of_messages_as_chosen_and_rejected(tmp_path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    row = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (pair,) = load_pairs(source(tmp_path, [row], **HH))
    assert (pair.prompt.instruction, pair.a, pair.b) == ("hi", "chosen", "rejected")


def test_a_critics_preferences() -> None:
    prompt = Prompt.from_text("p")
    made = [
        Preference(
            prompt=prompt,
            chosen=Completion(prompt_id=prompt.id, generator="g", text=text, finish_reason="length"),
            rejected=Completion(prompt_id=prompt.id, generator="g", text="no"),
            p_chosen=0.8,
        )
        for text in ("yes", "no", " ")
    ]
    found = from_preferences(made)
    assert [(pair.a, pair.b, round(pair.p_b, 6)) for pair in found] == [("yes", "no", 0.2)]
    assert found[0].finish_reasons == ("length", "stop")
    assert found.report.dropped == {"empty": 1, "identical": 1}


# ---- bad input -------------------------------------------------------------------------------------------------


def test_bad_pairs_are_dropped_and_counted_by_reason(tmp_path) -> None:
    good = {"prompt": "p", "a": "x", "b": "y", "p_b": 1.0}
    bad = [{"prompt": " "}, {"a": "y"}, {"a": "y \n"}, {"b": ""}, {"a": None}, {"p_b": None}]
    report = load_pairs(source(tmp_path, [good, *({**good, **change} for change in bad)])).report
    assert (report.read, report.kept) == (7, 1)
    assert report.dropped == {"no_prompt": 1, "identical": 2, "empty": 2, "no_label": 1}
    assert report.read == report.kept + sum(report.dropped.values())


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        ({"p_b": 1.2}, {}, "no probability"),
        ({"p_b": "high"}, {}, "must be a number"),
        ({"p_b": 3}, {"label_kind": "winner"}, "1 \\(a\\), 2 \\(b\\)"),
        ({"p_b": [True]}, {"label_kind": "winner"}, "label_kind: winner"),
        ({}, {"label": "human"}, "no column `human`"),
        ({}, {"group": "opponent"}, "`group` of the data source"),
        ({"a": {"x": 1}}, {}, "must be a text"),
        ({}, {"prompt": None}, "no dialogue"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, change, fields, words) -> None:
    row = {"prompt": "p", "a": "x", "b": "y", "p_b": 1.0, **change}
    with pytest.raises(DataError, match=rf"line 1.*{words}"):
        load_pairs(source(tmp_path, [row], **fields))


def test_a_file_without_a_usable_pair(tmp_path) -> None:
    with pytest.raises(DataError, match=r"2 rows read; left out: \{'identical': 2\}"):
        load_pairs(source(tmp_path, [{"prompt": "p", "a": "x", "b": "x", "p_b": 1}] * 2))


# ---- selection -------------------------------------------------------------------------------------------------


def _rows(sizes):
    return [
        {"prompt": f"p{i}", "a": f"a{j}", "b": f"b{j}", "p_b": 1.0}
        for i, size in enumerate(sizes)
        for j in range(size)
    ]


def test_a_limit_takes_many_prompts_and_a_larger_one_takes_more(tmp_path) -> None:
    rows = _rows([9, 1, 4, 6])
    found = {limit: load_pairs(source(tmp_path, rows, limit=limit), seed=3) for limit in (2, 4, 7, 20)}
    assert len({pair.prompt.id for pair in found[4]}) == 4
    assert list(found[7])[:4] == list(found[4])
    assert list(found[4])[:2] == list(found[2])
    assert len(found[20]) == 20
    shuffled = load_pairs(source(tmp_path, rows[::-1], limit=7), seed=3)
    assert list(shuffled) == list(found[7]), "the order of the file does not matter"
    assert list(load_pairs(source(tmp_path, rows, limit=7), seed=4)) != list(found[7])


@given(st.lists(st.integers(1, 5), min_size=2, max_size=12), st.floats(0, 0.99), st.integers(0, 5))
def test_a_prompt_is_on_one_side_of_the_split(sizes, share, seed) -> None:
    pairs = [
        Pair(Prompt.from_text(f"p{i}"), f"a{j}", f"b{j}", 1.0)
        for i, size in enumerate(sizes)
        for j in range(size)
    ]
    train, held_out = split_by_prompt(pairs, share, seed)
    sides = [{pair.prompt.id for pair in part} for part in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == len(pairs)
    assert train
    assert bool(held_out) == (share > 0)
    assert without_prompts(pairs, sides[1]) == train
    assert split_by_prompt(pairs[::-1], share, seed)[1] == held_out[::-1]


# ---- tokens ----------------------------------------------------------------------------------------------------


def test_ties_and_hard_labels_as_the_loss_sees_them() -> None:
    prompt = Prompt.from_text("p")
    pairs = [Pair(prompt, "x", "y", p) for p in (0.0, 0.3, 0.5, 0.9)]

    def seen(**fields) -> list[float]:
        return [pair.p_b for pair in training_pairs(pairs, RewardSpec(steps=1, **fields))]

    assert seen() == [0.0, 0.3, 0.5, 0.9]
    assert seen(ties="drop") == [0.0, 0.3, 0.9]
    assert seen(soft_labels=False) == [0.0, 0.0, 0.5, 1.0]
    assert seen(loss="rao_kupper") == [0.0, 0.3, 0.5, 0.9]


def test_the_preferred_side_is_chosen_and_the_end_of_context_survives_a_cut() -> None:
    tokenizer = load_tokenizer("symbols")
    prompt = Prompt.from_text("copy abc")
    pairs = [Pair(prompt, "a" * 40, "bb", 0.8, margin=2.0), Pair(prompt, "aa", "bb", 0.5)]
    limits = {"max_length": 24, "max_prompt_length": 16}
    first, second = encode_pairs(tokenizer, pairs, "model", end_of_context=3, **limits)
    plain, _ = encode_pairs(tokenizer, pairs, "model", **limits)
    assert (first.p_chosen, first.margin, second.p_chosen) == (0.8, 2.0, 0.5)
    assert first.rejected.response_truncated
    assert len(first.rejected.tokens) == 24
    assert first.rejected.tokens[-1] == first.chosen.tokens[-1] == 3
    assert first.chosen.tokens[:-1] == plain.chosen.tokens
    assert plain.chosen.tokens != plain.rejected.tokens
    batches = preference_batches([first, second], batch_size=2, pad_id=0, max_length=24, epochs=1)
    assert batches.report.response_truncated == 1


def test_further_columns_follow_their_pairs_and_belong_to_the_data() -> None:
    tokenizer = load_tokenizer("symbols")
    pairs = [Pair(Prompt.from_text(f"copy {'a' * (i + 1)}"), "x" * (i + 1), "y", 0.0) for i in range(9)]
    encoded = encode_pairs(tokenizer, pairs, "model", max_length=24, max_prompt_length=16)
    weights = np.arange(18, dtype=np.float32).reshape(9, 2) + 1
    options: dict[str, Any] = {
        "batch_size": 4,
        "micro_batch": 2,
        "pad_id": 0,
        "max_length": 24,
        "packing": True,
        "epochs": 1,
    }
    batches = preference_batches(
        encoded, columns={"margin": weights[:, 0], "member_weight": weights}, **options
    )
    seen = {}
    for batch in batches:
        index = batch["pair_index"]
        assert batch["margin"].shape == index.shape
        assert batch["member_weight"].shape == (*index.shape, 2)
        assert not batch["member_weight"][index < 0].any()
        seen |= {
            int(i): row.tolist() for i, row in zip(index[index >= 0], batch["member_weight"][index >= 0])
        }
    assert seen == dict(enumerate(weights.tolist()))
    other = preference_batches(encoded, columns={"margin": weights[:, 1]}, **options)
    with pytest.raises(ValueError, match="other data"):
        other.set_state(batches.get_state())
    with pytest.raises(ValueError, match="`margin` has 3 rows"):
        preference_batches(encoded, columns={"margin": weights[:3, 0]}, **options)
    json.dumps(batches.get_state())
