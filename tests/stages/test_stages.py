"""Each stage on its own: what its key depends on, and what it makes of known inputs."""

import dataclasses
import functools
import json
import random
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from laif_jax.config import EndpointSpec, MeshSpec, SimulatedSpec
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.critic import CRITICS
from laif_jax.models.model import load_model
from laif_jax.models.weights import WeightsError
from laif_jax.parallel.mesh import make_mesh
from laif_jax.records import Completion, Usage, write_jsonl
from laif_jax.stages import agreement, base, evaluate, fit, label, prompts, sample, sft, teach
from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.stages.split import sft_count, split
from laif_jax.stages.usage import usage_of
from laif_jax.worlds import symbols
from tests.studies import tiny

ORACLE = {
    **tiny.TREE["endpoints"],
    "strong": {"provider": "simulated", "simulated": {"world": "symbols", "accuracy": 1.0, "sharpness": 4.0}},
}


def completions(folder, rows: list[Completion], name: str = "given") -> Artifact:
    """A finished stage that holds these completions."""
    path = epath.Path(folder) / name
    write_jsonl(path / "completions.jsonl.gz", rows)
    return Artifact(path, {"key": name, "metrics": {}})


def answer(prompt, text: str, generator: str = "policy", index: int = 0) -> Completion:
    return Completion(prompt_id=prompt.id, generator=generator, text=text, sample_index=index)


def outside(folder) -> dict:
    """The settings of a study outside the synthetic world."""
    return {"data__symbols": None, "pretrain": ..., "model": {"source": str(folder)}}


def wrong(instruction: str) -> str:
    return "z" * (len(symbols.solve(instruction)) + 1)


# ---- prompts ---------------------------------------------------------------------------------------------------


def test_what_is_evaluated_is_not_trained_on_and_every_seed_is_evaluated_on_the_same(make, tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": f"question {i}"} for i in range(12)]
    write_jsonl(file, rows)
    write_jsonl(tmp_path / "e.jsonl", rows[8:] + [{"prompt": "only here"}])
    changes = {
        "data__train": {"kind": "jsonl", "path": str(file)},
        "data__eval": {"kind": "jsonl", "path": str(tmp_path / "e.jsonl")},
        **outside(tmp_path),
    }
    ctx = make(tmp_path, **changes)
    first = prompts.run(ctx)
    assert first.metrics == {"train": 8, "eval": 5, "dropped_because_in_eval": 4}
    texts = [row.prompt.instruction for row in prompts.read(first, "eval")]
    assert texts == [f"question {i}" for i in range(8, 12)] + ["only here"]
    second = prompts.run(make(tmp_path, seed=1, **changes))
    assert [row.prompt for row in prompts.read(second, "eval")] == [
        row.prompt for row in prompts.read(first, "eval")
    ]
    trained = [[row.prompt.id for row in prompts.read(artifact, "train")] for artifact in (first, second)]
    assert trained[0] != trained[1]
    assert set(trained[0]) == set(trained[1])

    # The key is of the file's content: moving it changes nothing, another row does.
    moved = file.rename(tmp_path / "moved.jsonl")
    changes["data__train"] = {"kind": "jsonl", "path": str(moved)}
    assert prompts.run(make(tmp_path, **changes)).key == first.key
    write_jsonl(moved, [*rows, {"prompt": "one more"}])
    assert prompts.run(make(tmp_path, **changes)).key != first.key


def test_data_in_several_files_is_known_by_its_content(make, tmp_path, monkeypatch):
    def key(root, path: str) -> str:
        source = {"kind": "jsonl", "path": path}
        data = {"data__root": str(root), "data__train": source, "data__eval": {**source, "path": "e.jsonl"}}
        return prompts.run(make(tmp_path, **data, **outside(tmp_path))).key

    monkeypatch.setenv("HOME", str(tmp_path))
    for root, last in (("one", 3), ("two", 3), ("three", 4)):
        write_jsonl(tmp_path / root / "e.jsonl", [{"prompt": "evaluated"}])
        for part in (1, 2):
            rows = [{"prompt": f"question {part} {i}"} for i in range(last if part == 2 else 3)]
            write_jsonl(tmp_path / root / "parts" / f"part-{part}.jsonl", rows)
    for path in ("parts", "parts/part-*.jsonl"):
        first = key(tmp_path / "one", path)
        assert key(tmp_path / "two", path) == key("~/two", path) == first
        assert key(tmp_path / "three", path) != first


def test_nothing_to_train_on_is_an_error(make, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the same"}])
    source = {"kind": "jsonl", "path": str(tmp_path / "p.jsonl")}
    ctx = make(tmp_path, data__train=source, data__eval=source, **outside(tmp_path))
    with pytest.raises(StageError, match="no prompts are left"):
        prompts.run(ctx)


@pytest.mark.parametrize("total", [1, 7, 40])
def test_a_larger_share_contains_every_smaller_one(total):
    rows = list(range(total))
    last: list[int] = []
    for share in (0.01, 0.1, 0.5, 1.0):
        first, rest = split(rows, share)
        assert [*first, *rest] == rows
        assert len(first) == sft_count(total, share) >= 1
        assert list(first[: len(last)]) == last
        last = list(first)
    assert last == rows


# ---- teachers --------------------------------------------------------------------------------------------------


def test_a_teachers_key_holds_what_its_answers_depend_on(make, tmp_path):
    def settings(**changes):
        ctx = make(tmp_path, **changes)
        return teach.teacher_settings(ctx, ctx.config.teachers["weak"])

    plain = settings()
    assert (
        settings(
            endpoints__weak__concurrency=3, endpoints__weak__timeout=1.0, endpoints__weak__max_attempts=9
        )
        == plain
    )
    priced = settings(endpoints__weak__prompt_price=1.0, endpoints__weak__completion_price=2.0)
    assert priced == plain
    assert settings(endpoints__weak__simulated__skill=0.6) != plain
    assert settings(endpoints__weak__model="other") != plain
    assert settings(teachers__weak__temperature=0.5) != plain


def test_a_local_model_is_known_by_its_weights(make, tmp_path):
    def settings(path):
        endpoints = {**tiny.TREE["endpoints"], "weak": {"provider": "llama_cpp", "gguf": str(path)}}
        return teach.endpoint_settings(make(tmp_path, endpoints=endpoints), "weak")

    file = tmp_path / "a.gguf"
    file.write_bytes(b"weights")
    first = settings(file)
    assert settings(file.rename(tmp_path / "b.gguf")) == first
    (tmp_path / "b.gguf").write_bytes(b"other weights")
    assert settings(tmp_path / "b.gguf") != first


def test_completions_of_the_data(make, tmp_path):
    rows = [
        {"prompt": f"question {i}", "answers": {"gpt": "" if i == 3 else f"answer {i}"}} for i in range(10)
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    write_jsonl(tmp_path / "e.jsonl", [{"prompt": "evaluated", "answers": {"gpt": "x"}}])
    source = {"kind": "jsonl", "completions": "answers"}

    def run(column, folder=tmp_path, **changes):
        ctx = make(
            folder, data={"train": {**source, "path": str(tmp_path / "p.jsonl")},
                            "eval": {**source, "path": str(tmp_path / "e.jsonl")}},
            teachers__weak={"completions": column}, pretrain=..., model={"source": str(tmp_path)}, **changes,
        )  # fmt: skip
        return teach.run(ctx, prompts.run(ctx), teacher="weak", split="train")

    found = run("gpt")
    assert {c.text for c in teach.read(found)} == {f"answer {i}" for i in range(10) if i != 3}
    assert found.metrics["missing"] == 1
    with pytest.raises(StageError, match="no completions of `gpt4`; it holds: gpt"):
        run("gpt4")
    with pytest.raises(StageError, match=r"9 of 10 prompts \(90.0%\).*no text in column `gpt`"):
        run("gpt", folder=tmp_path / "strict", labeling__min_coverage=0.95)


def test_costs_are_by_the_endpoints_prices():
    used = Usage(prompt_tokens=3_000_000, completion_tokens=500_000)
    rows = [Completion(prompt_id="p", generator="g", text=text, usage=used) for text in "ab"]
    plain = EndpointSpec(provider="simulated", simulated=SimulatedSpec())
    priced = plain.model_copy(update={"prompt_price": 0.5, "completion_price": 2.0})
    tokens = {"prompt_tokens": 6_000_000, "completion_tokens": 1_000_000}
    assert usage_of(rows, priced) == {**tokens, "cost": pytest.approx(6 * 0.5 + 1 * 2.0)}
    assert usage_of(rows, None) == {**tokens, "cost": None}
    assert usage_of(rows, plain) == {**tokens, "cost": 0.0}  # a model of our own
    # The table knows the others: cached tokens are cheaper, a batch is half the price, and who is unknown is unknown.
    table = EndpointSpec(provider="openai", base_url="https://api.openai.com/v1", model="gpt-4.1")
    assert usage_of(rows, table)["cost"] == pytest.approx(6 * 2.0 + 1 * 8.0)
    assert usage_of(rows, table.model_copy(update={"batch": True}))["cost"] == pytest.approx(10.0)
    cached = [
        row.model_copy(update={"usage": used.model_copy(update={"cached_tokens": 10**6})}) for row in rows
    ]
    assert usage_of(cached, table)["cost"] == pytest.approx(4 * 2.0 + 2 * 0.5 + 1 * 8.0)
    assert usage_of(rows, table.model_copy(update={"model": "gpt-99"}))["cost"] is None


# ---- critics and judges ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(make):
    """A context whose critic and judge are never wrong, and its prompts."""
    ctx = make(endpoints=ORACLE)
    return ctx, prompts.run(ctx)


@pytest.mark.parametrize("against_teacher", [False, True])
def test_an_oracles_preferences_point_the_right_way(oracle, tmp_path, against_teacher):
    ctx, asked = oracle
    rng = random.Random(0)
    rows = [row.prompt for row in prompts.read(asked, "train")]
    texts = {p.id: rng.sample([symbols.solve(p.instruction), wrong(p.instruction)], 2) for p in rows}
    name = f"policy {against_teacher}"
    if against_teacher:
        policy = completions(tmp_path, [answer(p, texts[p.id][0]) for p in rows], name)
        other = completions(tmp_path, [answer(p, texts[p.id][1], "t") for p in rows], "teacher")
    else:
        policy = completions(
            tmp_path, [answer(p, texts[p.id][i], index=i) for p in rows for i in (0, 1)], name
        )
        other = None
    made = label.run(ctx, asked, policy, other, critic="strong")
    found = label.read_preferences(made)
    assert len(found) == made.metrics["comparisons"] == len(rows)
    for preference in found:
        assert preference.chosen.text == symbols.solve(preference.prompt.instruction)
        assert preference.rejected.text == wrong(preference.prompt.instruction)
        assert preference.p_chosen > 0.9
    assert [preference.prompt.id for preference in found] == [p.id for p in rows]
    assert made.metrics["swap_consistency"] == 1.0


def test_texts_that_are_empty_are_not_compared(oracle, tmp_path):
    ctx, asked = oracle
    rows = [row.prompt for row in prompts.read(asked, "train")][:6]
    texts = [
        [symbols.solve(p.instruction), "" if n == 2 else wrong(p.instruction)] for n, p in enumerate(rows)
    ]
    pairs = [answer(p, texts[n][i], index=i) for n, p in enumerate(rows) for i in (0, 1)]
    lonely = [answer(p, "b") for p in rows[5:]]  # one sample only
    made = label.run(ctx, asked, completions(tmp_path, pairs[:-2] + lonely, "pairs"), None, critic="strong")
    assert made.metrics["comparisons"] == 4


def test_the_judge_puts_the_arm_second_and_a_missing_reference_is_no_verdict(oracle, tmp_path):
    ctx, asked = oracle
    rows = [row.prompt for row in prompts.read(asked, "eval")]
    right = {p.id: i % 4 != 0 for i, p in enumerate(rows)}  # the arm is right on three of four
    arm = [
        answer(p, symbols.solve(p.instruction) if right[p.id] else wrong(p.instruction), "arm") for p in rows
    ]
    reference = [
        answer(p, wrong(p.instruction) if right[p.id] else symbols.solve(p.instruction), "r") for p in rows
    ]
    made = evaluate.run(
        ctx, asked, completions(tmp_path, arm, "arm"), completions(tmp_path, reference[:-1], "reference")
    )
    verdicts = evaluate.read(made)
    assert [row["prompt_id"] for row in verdicts] == [p.id for p in rows]
    assert [row["p"] for row in verdicts] == [float(right[p.id]) for p in rows[:-1]] + [None]
    assert verdicts[-1]["reference"] is None
    metrics = made.metrics
    assert (metrics["n"], metrics["missing"]) == (15, 1)
    assert metrics["win_rate"] == pytest.approx(100 * 11 / 15) == metrics["true_win_rate"]
    assert metrics["true_quality"] == pytest.approx(12 / 16)
    assert metrics["longest_wins"] == pytest.approx(100 * 4 / 15)  # wrong answers are longer by one


def test_a_judge_is_compared_with_humans(make, tmp_path):
    """An oracle agrees wholly with humans who know the truth, on pairs that it can decide."""
    rows = []
    for i, instruction in enumerate(["rev:abc", "sort:cba", "copy:ab", "twice:ab"] * 3):
        sides = [symbols.solve(instruction), wrong(instruction)]
        better = i % 2
        row = {"prompt": instruction, "a": sides[better], "b": sides[1 - better], "human": [1 + better]}
        rows.append({"source": "made", **row})
    write_jsonl(tmp_path / "human.jsonl.gz", rows)
    ctx = make(tmp_path, endpoints=ORACLE, evaluation__agreement="human.jsonl.gz", data__root=str(tmp_path))
    made = agreement.run(ctx)
    (everything,) = [row for row in made.metrics["by_source"] if row["source"] == "all"]
    assert everything["without_ties"] == 1.0
    missing = make(tmp_path, evaluation__agreement="no.jsonl", data__root=str(tmp_path))
    with pytest.raises(StageError, match="no such file of human labels"):
        agreement.run(missing)


def test_a_judge_that_cannot_be_reached_is_a_failure_that_can_be_mended(make, tmp_path):
    row = {"source": "made", "prompt": "rev:abc", "a": "cba", "b": "abc", "human": [1]}
    write_jsonl(tmp_path / "human.jsonl", [row])
    dead = {"provider": "simulated", "max_attempts": 1, "simulated": {"failure_rate": 1.0}}
    ctx = make(
        tmp_path,
        endpoints={**ORACLE, "strong": dead},
        evaluation__agreement="human.jsonl",
        data__root=str(tmp_path),
    )
    with pytest.raises(StageError, match=r"0 of 1 comparisons.*'failed': 1"):
        agreement.run(ctx)
    (manifest,) = tmp_path.glob("agreement-*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "failed"  # so it is asked again by the next run


def test_a_critic_of_ones_own_is_known_by_its_content(make, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(CRITICS / "ab_logprob", folder)

    def settings(path):
        critic = {"endpoint": "strong", "critic": str(path)}
        ctx = make(tmp_path, critics={"strong": critic})
        return label.critic_settings(ctx, ctx.config.critics["strong"])

    first = settings(folder)
    moved = folder.rename(tmp_path / "moved")
    assert settings(moved) == first
    prompt = moved / "prompt.txt"
    prompt.write_text(prompt.read_text() + "\nBe strict.\n")
    assert settings(moved) != first


def test_a_service_that_is_not_there_is_a_stages_failure(make, tmp_path):
    ctx = make(tmp_path)
    ctx.services.__dict__["client"] = LabelClient("http://127.0.0.1:9", patience=0.1)
    asked = prompts.run(ctx)
    with pytest.raises(StageError, match="laif serve labels"):
        teach.run(ctx, asked, teacher="weak", split="train")


# ---- models ----------------------------------------------------------------------------------------------------


def finished_stage(study, kind: str, **settings) -> Artifact:
    """The stage of the finished study that has these settings."""
    for path in study.glob(f"{kind}-*/manifest.json"):
        manifest = json.loads(path.read_text())
        if all(manifest["settings"][name] == value for name, value in settings.items()):
            return Artifact(epath.Path(path.parent), manifest)
    raise AssertionError(f"no {kind} with {settings}")


def test_one_device_gives_what_eight_give(make, tmp_path):
    """The finished study ran on data=2 x fsdp=2 x tensor=2; the same SFT on one device."""
    study = tiny.copy_of_finished(tmp_path)
    eight = finished_stage(study, "sft", share=1.0)
    before = load_model(str(eight.path / "model"))
    shutil.rmtree(eight.path)
    ctx = make(tmp_path, mesh={"data": 1, "fsdp": 1})
    ctx = dataclasses.replace(ctx, root=epath.Path(study))
    ctx.__dict__["mesh"] = make_mesh(MeshSpec(), jax.devices()[:1])
    taught = teach.run(ctx, prompts.run(ctx), teacher="strong", split="train", stop=40)
    one = sft.run(ctx, base.run(ctx), prompts.run(ctx), taught, share=1.0)
    assert one.key == eight.key  # the mesh changes no result, so it changes no key
    assert one.manifest["started"] >= eight.manifest["started"]
    after = load_model(str(one.path / "model"))
    for left, right in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    assert one.metrics["last"]["loss"] == pytest.approx(eight.metrics["last"]["loss"], rel=1e-4)


def test_adapters_train_over_weights_that_are_frozen_in_the_compute_dtype(make, tmp_path):
    study = tiny.copy_of_finished(tmp_path)
    ctx = make(tmp_path, model__lora={"rank": 2, "targets": ["q", "down"]}, model__dtype="bfloat16")
    ctx = dataclasses.replace(ctx, root=epath.Path(study))
    start = finished_stage(study, "pretrain")
    leaves = jax.tree_util.tree_leaves_with_path(fit.load(ctx, base.model_folder(start)).params)
    dtypes = {("lora_" in str(path[-1]), str(leaf.dtype)) for path, leaf in leaves}
    assert dtypes == {(True, "float32"), (False, "bfloat16")}
    taught = teach.run(ctx, prompts.run(ctx), teacher="strong", split="train", stop=40)
    made = sft.run(ctx, start, prompts.run(ctx), taught, share=1.0)
    before, after = (load_model(str(base.model_folder(stage))).params for stage in (start, made))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        frozen = np.asarray(old.astype(jax.numpy.bfloat16), np.float32)
        adapted = {"q", "down"} & {entry.key for entry in path}
        assert np.array_equal(frozen, new) != bool(adapted), path


def test_no_sample_is_dropped_and_the_batch_size_changes_nothing(make, tmp_path):
    study = tiny.copy_of_finished(tmp_path)
    before = finished_stage(study, "sample", generator="SFT weak")
    rows = sample.read(before)
    shutil.rmtree(before.path)
    ctx = dataclasses.replace(make(tmp_path, evaluation__sampling__batch_size=5), root=epath.Path(study))
    model = finished_stage(study, "sft", share=0.25)
    made = sample.run(
        ctx, prompts.run(ctx), model, generator="SFT weak", split="eval", spec=ctx.config.evaluation.sampling,
        max_prompt_length=24,
    )  # fmt: skip
    assert made.key == before.key
    assert sample.read(made) == rows
    assert len(rows) == 16
    assert {row.finish_reason for row in rows} <= {"stop", "length"}
    assert made.metrics["response_length/clip_ratio"] == np.mean(
        [row.finish_reason == "length" for row in rows]
    )


def test_sampling_that_was_cut_short_goes_on_behind_what_it_has(make, tmp_path, monkeypatch):
    study = tiny.copy_of_finished(tmp_path)
    before = finished_stage(study, "sample", generator="SFT weak")
    rows = sample.read(before)
    shutil.rmtree(before.path)
    ctx = dataclasses.replace(make(tmp_path, evaluation__sampling__batch_size=6), root=epath.Path(study))
    model = finished_stage(study, "sft", share=0.25)
    monkeypatch.setattr(sample, "PART", 1)
    calls = []

    def generate(*arguments, fail_at=None, **options):
        if len(calls) == fail_at:
            raise OSError("the machine was taken away")
        calls.append(list(options["indices"]))
        return actual(*arguments, **options)

    actual = sample.generate

    def run():
        return sample.run(
            ctx, prompts.run(ctx), model, generator="SFT weak", split="eval",
            spec=ctx.config.evaluation.sampling, max_prompt_length=24,
        )  # fmt: skip

    monkeypatch.setattr(sample, "generate", functools.partial(generate, fail_at=2))
    with pytest.raises(StageError, match="taken away"):
        run()
    monkeypatch.setattr(sample, "generate", generate)
    made = run()
    assert [calls[0][0], calls[-1][-1]] == [0, 15]
    assert sum(map(len, calls)) == 16, "nothing was drawn twice"
    assert sample.read(made) == rows
    assert not (made.path / "parts").exists()


def test_a_share_that_leaves_no_prompts_to_sample_for_is_named(make, tmp_path):
    ctx = make(tmp_path)
    model = completions(tmp_path, [], "model")
    with pytest.raises(StageError, match="takes all 40 of them"):
        sample.run(
            ctx, prompts.run(ctx), model, generator="policy", split="train", spec=ctx.config.sampling,
            max_prompt_length=24, start=40,
        )  # fmt: skip


def test_pretraining_shows_samples_too(make, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(base.fit, "fit", lambda *_, **options: seen.update(options) or {})
    base.run(make(tmp_path, pretrain__sample_every=2))
    assert len(seen["shown"]) == base.fit.SHOWN


def test_every_replicate_would_make_the_same_base(make, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(base.fit, "fit", lambda *args, **_: seen.append(args[6].at(0)) or {})
    made = [base.run(make(tmp_path / str(seed), seed)) for seed in (0, 1)]
    assert made[0].key == made[1].key
    jax.tree.map(np.testing.assert_array_equal, *seen)


def test_an_unknown_model_is_named(make, tmp_path):
    ctx = make(tmp_path, model={"source": "no-such-model"}, pretrain=...)
    with pytest.raises(WeightsError, match="no-such-model: no such model"):
        base.run(ctx)
