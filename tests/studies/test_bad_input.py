"""What goes wrong in the world, met by `laif run`: the reason is said, the rest goes on, nothing paid for is lost.

Each test goes on from a finished study, from which the stages that it is about are removed.
"""

import contextlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from laif_jax.records import Judgement, Preference, read_jsonl
from tests.labeling.helpers import Reply, chat, fake_endpoint
from tests.studies import tiny


@pytest.fixture(scope="module")
def numbers():
    return tiny.numbers(tiny.results(tiny.finished()))


def endpoint(url: str, **rest: Any) -> dict[str, Any]:
    return {"provider": "openai", "base_url": url, "max_attempts": 1, "timeout": 5.0, **rest}


def errors(folder: Path) -> dict[str, str]:
    """Stage name -> why it failed, of a study's results."""
    return {row["stage"]: row["error"] for row in tiny.results(folder)["stages"] if row["status"] == "failed"}


def skipped(folder: Path) -> set[str]:
    return {
        row["arm"] or row["stage"] for row in tiny.results(folder)["stages"] if row["status"] == "skipped"
    }


# ---- endpoints -------------------------------------------------------------------------------------------------


def test_dead_and_misbehaving_teachers_fail_their_arms_alone(tmp_path):
    with contextlib.ExitStack() as stack, socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        replies = {
            "429": Reply(429, {"error": {"message": "slow down"}}),
            "500": Reply(500, b"<html>oops</html>"),
            "no choices": Reply(200, {"choices": []}),
            "not json": Reply(200, b"<html>welcome</html>"),
        }
        urls = {"refused": f"http://127.0.0.1:{free.getsockname()[1]}/v1"}
        for name, reply in replies.items():
            urls[name] = stack.enter_context(fake_endpoint(lambda n, r, reply=reply: reply)).url
        tiny.copy_of_finished(tmp_path)
        status = tiny.run(
            tmp_path,
            endpoints=tiny.TREE["endpoints"] | {name: endpoint(url) for name, url in urls.items()},
            teachers=tiny.TREE["teachers"] | {name: {"endpoint": name} for name in urls},
            arms=[
                *({"name": f"arm {name}", "teacher": name, "share": 0.25} for name in urls),
                *tiny.TREE["arms"],
            ],
        )
    assert status == 1
    found = errors(tmp_path)
    assert set(found) == {f"teacher {name}" for name in urls}
    says = {
        "refused": "refused", "429": "slow down", "500": "500", "no choices": "empty `choices`", "not json": "not JSON",
    }  # fmt: skip
    for name, words in says.items():
        message = found[f"teacher {name}"]
        assert f"teacher `{name}` answered 0 of 10 prompts" in message
        assert words in message, message
        assert "run again" in message
    results = tiny.results(tmp_path)
    assert list(results["arms"]) == ["SFT weak", "SFT strong", "LAIF weak"]
    assert all(any(f"teacher {name}" in text for text in results["warnings"]) for name in urls)
    assert {f"arm {name}" for name in urls} <= skipped(tmp_path)


def test_a_critic_without_log_probs_fails_its_arm_alone_and_a_retry_pays_only_what_failed(tmp_path, numbers):
    tiny.copy_of_finished(tmp_path)
    critics = {"strong": {"endpoint": "critic", "critic": "ab_logprob"}}
    with fake_endpoint(chat("A")) as server:
        endpoints = tiny.TREE["endpoints"] | {"critic": endpoint(server.url)}
        assert tiny.run(tmp_path, endpoints=endpoints, critics=critics) == 1
        (message,) = errors(tmp_path).values()
        assert "critic `strong` decided 0 of 24" in message
        assert "log-probs" in message
        results = tiny.results(tmp_path)
        assert list(results["arms"]) == ["SFT weak", "SFT strong"]
        assert "annot be answered" in results["answer"]

        # It learns to give them to half of the prompts; later to all. Answers that came are not asked for again.
        good = chat("A", top={"A": -0.2, "B": -1.8})
        server.reply = lambda n, request: Reply(body=good if n % 2 else chat("A"))
        assert tiny.run(tmp_path, endpoints=endpoints, critics=critics) == 1
        assert "decided" in next(iter(errors(tmp_path).values()))
        before = sum(server.calls.values())
        answered = tiny.calls(tmp_path)
        server.reply = lambda n, request: Reply(body=good)
        assert tiny.run(tmp_path, endpoints=endpoints, critics=critics) in (0, 1)
        assert sum(server.calls.values()) - before < 48
        assert tiny.calls(tmp_path) >= answered


def test_a_judge_that_never_names_an_answer_stops_the_evaluation_and_nothing_else(tmp_path, numbers):
    tiny.copy_of_finished(tmp_path, without=["evaluate"])
    before = tiny.manifests(tmp_path)
    judge = {"provider": "simulated", "simulated": {"world": "symbols", "garbage_rate": 1.0}}
    assert (
        tiny.run(
            tmp_path, endpoints=tiny.TREE["endpoints"] | {"mute": judge}, evaluation__judge__endpoint="mute"
        )
        == 1
    )
    found = errors(tmp_path)
    assert set(found) == {"evaluation of SFT weak", "evaluation of SFT strong", "evaluation of LAIF weak"}
    for message in found.values():
        assert "the judge decided 0 of 16 comparisons" in message
        assert "{'unparsable': 16}" in message
    assert tiny.results(tmp_path)["arms"] == {}
    after = tiny.manifests(tmp_path)
    assert {name: after[name] for name in before} == before
    # With a judge that speaks, everything that was trained and sampled serves.
    assert tiny.run(tmp_path) == 0
    assert tiny.numbers(tiny.results(tmp_path)) == numbers


def test_failures_of_the_critic_are_counted_and_never_become_preferences(tmp_path):
    folder = tiny.copy_of_finished(tmp_path, without=["label", "dpo"])
    critic = {
        "provider": "simulated",
        "max_attempts": 1,
        "simulated": {
            "world": "symbols", "accuracy": 0.9, "failure_rate": 0.05, "refusal_rate": 0.03, "garbage_rate": 0.02,
            "seed": 5,
        },
    }  # fmt: skip
    assert (
        tiny.run(
            tmp_path,
            endpoints=tiny.TREE["endpoints"] | {"critic": critic},
            critics={"strong": {"endpoint": "critic", "critic": "laif_basic"}},
            labeling__min_coverage=0.5,
        )
        == 0
    )
    (labels,) = folder.glob("label-*")
    judgements = [Judgement.from_row(row) for row in read_jsonl(labels / "judgements.jsonl.gz")]
    decided = {j.id: j for j in judgements if j.p_b is not None}
    metrics = json.loads((labels / "manifest.json").read_text())["metrics"]
    states = ("ok", "tie", "unparsable", "refused", "failed")
    assert metrics["failed"] + metrics["refused"] + metrics["unparsable"] > 0
    assert sum(metrics[state] for state in states) == metrics["comparisons"] == len(judgements) == 24
    assert metrics["missing"] == 0
    assert len(decided) == metrics["ok"] + metrics["tie"]
    preferences = [Preference.from_row(row) for row in read_jsonl(labels / "preferences.jsonl.gz")]
    assert metrics["preferences"] == len(preferences)
    for preference in preferences:
        assert preference.judgement_ids[0] in decided
        assert preference.p_chosen > 0.5


# ---- disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "file"),
    [("label", "preferences.jsonl.gz"), ("dpo", "model/tokenizer.json")],
)
def test_a_disk_that_fills_up_during_a_stage_loses_nothing(tmp_path, numbers, kind, file):
    """/dev/full refuses every byte, as a full disk does."""
    folder = tiny.copy_of_finished(tmp_path)
    (stage,) = folder.glob(f"{kind}-*")
    kept = {name: m for name, m in tiny.manifests(tmp_path).items() if not name.startswith(kind)}
    shutil.rmtree(stage)
    target = stage / file
    full = target.with_name(f".{target.name}.tmp")
    full.parent.mkdir(parents=True)
    os.symlink("/dev/full", full)
    paid = tiny.calls(tmp_path)
    assert tiny.run(tmp_path) == 1
    (message,) = errors(tmp_path).values()
    assert str(target) in message
    assert "No space left on device" in message
    assert re.search("[Ff]ree", message), message
    assert list(tiny.results(tmp_path)["arms"]) == ["SFT weak", "SFT strong"]
    after = tiny.manifests(tmp_path)
    assert {name: after[name] for name in kept} == kept
    # Space is free again.
    full.unlink(missing_ok=True)
    assert tiny.run(tmp_path) == 0
    assert tiny.calls(tmp_path) == paid
    assert tiny.numbers(tiny.results(tmp_path)) == numbers


def test_a_disk_without_room_for_the_results_is_one_message(tmp_path, capsys, numbers):
    folder = tiny.copy_of_finished(tmp_path)
    (folder / "results.json").unlink()
    os.symlink("/dev/full", folder / ".results.json.tmp")
    assert tiny.run(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("laif: ")
    assert "results.json: No space left on device. Free space" in error
    assert tiny.run(tmp_path) == 0
    assert tiny.numbers(tiny.results(tmp_path)) == numbers


# ---- critics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("critic", "says"), [("ab_logprop", "ab_logprop"), ("rating_1_10", "compares two responses: ab_logprob")]
)
def test_a_critic_that_does_not_fit_is_named_before_anything_is_trained(tmp_path, capsys, critic, says):
    critics = {"strong": {"endpoint": "strong", "critic": critic}}
    assert tiny.run(tmp_path, critics=critics) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert tiny.manifests(tmp_path) == {}


# ---- data and models -------------------------------------------------------------------------------------------


def prompts_file(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


GOOD = [
    {"prompt": f"rev:{text}"} for text in ("abcd", "dcba", "aabb", "bbaa", "abab", "cdcd", "acac", "bdbd")
]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*GOOD, '{"prompt": "rev:ab"\n'], ", line 9: not valid JSON"),
        ([*GOOD, {"instruction": "rev:ab"}], "9"),
        ([], "prompt"),
        ([{"prompt": ""}], "prompt"),
    ],
)
def test_malformed_and_empty_data_rows_are_named(tmp_path, rows, says):
    path = prompts_file(tmp_path, rows)
    tiny.copy_of_finished(tmp_path)
    assert tiny.run(tmp_path, data__train={"kind": "jsonl", "path": str(path)}) == 1
    message = errors(tmp_path)["prompts"]
    assert str(path) in message
    assert says in message
    assert tiny.results(tmp_path)["arms"] == {}


def test_prompts_longer_than_the_context_are_cut_counted_and_answered(tmp_path):
    """The model has room for 64 tokens; the prompts have up to 200."""
    long = [{"prompt": "rev:" + "abcd" * (1 + 7 * i), "completions": {"given": "dcba"}} for i in range(8)]
    source = {"kind": "jsonl", "path": str(prompts_file(tmp_path, long)), "completions": "completions"}
    tiny.copy_of_finished(tmp_path)
    arm = {"name": "SFT given", "teacher": "given", "share": 0.5}
    status = tiny.run(
        tmp_path,
        data__train=source,
        teachers=tiny.TREE["teachers"] | {"given": {"completions": "given"}},
        arms=[arm, {**tiny.TREE["arms"][2], "teacher": "given", "share": 0.5}],
        questions=[],
    )
    assert status == 0, errors(tmp_path)
    new = set(tiny.manifests(tmp_path)) - set(tiny.manifests(tiny.finished()))
    found = {
        name.split("-")[0]: tiny.manifests(tmp_path)[name] for name in new if not name.startswith("evaluate")
    }
    sampled = [tiny.manifests(tmp_path)[name] for name in new if name.startswith("sample")]
    (train,) = [m["metrics"] for m in sampled if m["settings"]["split"] == "train"]
    assert train["completions"] == 8  # four prompts, two samples each: none was dropped
    assert train["prompts_truncated"] >= 3
    assert found["sft"]["metrics"]["examples"]


def test_a_truncated_weight_file_is_named_before_anything_is_trained(tmp_path):
    (source,) = (tiny.finished() / "runs" / "tiny").glob("pretrain-*")
    model = tmp_path / "base"
    shutil.copytree(source / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tiny.copy_of_finished(tmp_path)
    assert tiny.run(tmp_path, pretrain=..., model={"source": str(model), "dtype": "float32"}) == 1
    assert str(weights) in next(iter(errors(tmp_path).values()))
