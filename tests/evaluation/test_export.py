"""The file for alpaca_eval: fields, order, bytes."""

import json

import pytest

from laif_jax.evaluation.export import alpaca_eval_rows, write_alpaca_eval
from laif_jax.records import Message, Prompt

TEXTS = [" leading space\n", "trailing \t", "naïve — 漢字 🙂", '"quotes" \\ and <script>', "plain"]


def _prompts():
    return [Prompt.from_text(text, source="koala", dataset="vicuna") for text in TEXTS]


def test_round_trip_is_byte_identical_and_in_order(tmp_path):
    path = tmp_path / "outputs.json"
    outputs = [f"{text}!" for text in reversed(TEXTS)]
    assert write_alpaca_eval(path, _prompts(), outputs, "my-model") == len(TEXTS)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rows] == TEXTS
    assert [row["output"] for row in rows] == outputs
    assert {row["generator"] for row in rows} == {"my-model"}
    assert {row["dataset"] for row in rows} == {"vicuna"}
    assert list(rows[0]) == ["instruction", "output", "generator", "dataset"]


def test_dataset_name():
    prompts = [Prompt.from_text("x", source="flask")]
    assert alpaca_eval_rows(prompts, ["y"], "m")[0]["dataset"] == "flask"
    assert alpaca_eval_rows(prompts, ["y"], "m", dataset="mine")[0]["dataset"] == "mine"


def test_refusals(tmp_path):
    prompts = _prompts()
    with pytest.raises(ValueError, match="5 prompts but 4 outputs"):
        alpaca_eval_rows(prompts, ["x"] * 4, "m")
    with pytest.raises(ValueError, match="same instruction"):
        alpaca_eval_rows([prompts[0], prompts[0]], ["x", "y"], "m")
    with pytest.raises(ValueError, match="generator"):
        alpaca_eval_rows(prompts, ["x"] * 5, "")
    with pytest.raises(ValueError, match=r"\.json"):
        write_alpaca_eval(tmp_path / "outputs.jsonl", prompts, ["x"] * 5, "m")
    turns = Prompt(messages=(Message(role="user", content="a"), Message(role="assistant", content="b")))
    with pytest.raises(ValueError, match="single instructions"):
        alpaca_eval_rows([turns], ["x"], "m")
