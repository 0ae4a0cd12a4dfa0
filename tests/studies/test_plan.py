"""The plan of a study: what it counts is what the study asks."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from laif_jax.cli.main import main
from laif_jax.config import EndpointSpec, load_config
from laif_jax.labeling import plan as planning
from laif_jax.labeling.plan import PlanRow
from laif_jax.records import write_jsonl
from laif_jax.stages.artifact import StageError
from laif_jax.studies import run
from laif_jax.studies.plan import plan_study, show_plan
from tests.studies import tiny, tiny_rl

PAID = {"provider": "openai", "base_url": "https://api.openai.com/v1", "model": "gpt-4.1-mini"}
LEFT = 30  # prompts that SFT on a quarter of the 40 leaves


def planned(folder, *overrides: str, **changes: Any) -> dict[str, PlanRow]:
    config = load_config(str(tiny.write(folder, **{**tiny_rl.CHANGES, **changes})), overrides)
    return {f"{row.role} {row.name}": row for row in plan_study(config).rows}


def test_rounds_are_counted_up_to_their_bounds(tmp_path) -> None:
    free = planned(tmp_path)
    assert free["critic strong"].calls == 2 * 3 * LEFT
    bounded = planned(tmp_path, "iterate.max_comparisons=20")
    assert bounded["critic strong"].calls == 2 * (LEFT + 2 * 20)
    assert any("max_comparisons" in why for why in bounded["critic strong"].at_most)
    fewer = planned(tmp_path, "iterate.prompts_per_round=5")
    assert fewer["critic strong"].calls == 2 * (LEFT + 2 * 10)
    config = load_config(str(tiny.write(tmp_path, **tiny_rl.CHANGES)), ["iterate.labels=human"])
    people = plan_study(config)
    assert sum(row.calls for row in people.rows if row.role == "critic") == 2 * LEFT
    assert "people are asked about 60 comparisons at most" in people.notes


def test_a_bound_in_dollars_needs_a_price_that_somebody_knows(tmp_path, monkeypatch, capsys) -> None:
    def began(*_, **__):
        pytest.fail("the study began")

    def study(**endpoint: Any) -> str:
        asked = {**tiny.TREE["endpoints"], "strong": {"provider": "openai", **endpoint}}
        changes = {**tiny_rl.CHANGES, "endpoints": asked}
        changes["iterate"] = {**tiny_rl.CHANGES["iterate"], "max_cost": 1.0}
        return str(tiny.write(tmp_path, **changes))

    unknown = {"base_url": "http://127.0.0.1:9/v1", "model": "mine"}
    monkeypatch.setattr(run, "execute", began)
    assert main(["run", study(**unknown)]) == 2
    said = capsys.readouterr().err
    assert "iterate.max_cost: no price is known for the endpoint `strong` of arm `rounds`" in said
    assert "`prompt_price` and `completion_price`" in said
    run._check_bounds(load_config(study(**unknown, prompt_price=1.0, completion_price=2.0)))
    run._check_bounds(load_config(study(base_url=PAID["base_url"], model=PAID["model"])))  # the table's


def test_shares_are_counted_exactly(tmp_path) -> None:
    """Names of stages tell a share in whole per cents only."""
    arms = [{**arm, "share": 0.125} for arm in tiny_rl.ARMS[:2]]
    rows = planned(tmp_path, arms=arms, **tiny_rl.without_sections("dpo"))
    assert rows["critic strong"].calls == 2 * 35
    assert rows["teacher weak"].calls == 5


def test_ratings_of_every_rollout_and_of_a_sweep_are_counted(tmp_path) -> None:
    arm = {**tiny_rl.FROM, "name": "direct", "optimize": "ppo", "reward": "critic", "critic": "rater"}
    ppo = {**tiny_rl.PPO, "value_init": "policy", "iterations": 5, "eval_every": 2}
    changes = tiny_rl.without_sections("ppo") | {
        "arms": [tiny_rl.ARMS[0], arm],
        "critics": {"rater": {"endpoint": "strong", "critic": "rating_1_10"}},
    }
    once = planned(tmp_path, ppo=ppo, **changes)["reward rater"]
    assert once.calls == 5 * 8 + 4 * 8  # evaluated at 0, 2, 4 and 5
    assert once.critic == "rating_1_10"
    sweep = {"kl_coefs": [0.0, 0.05], "learning_rates": [1e-3]}
    swept = planned(tmp_path, ppo={**ppo, "sweep": sweep}, **changes)["reward rater"]
    assert swept.calls == 2 * once.calls  # the coefficient 0.05 is the arm's own


def test_a_run_of_ppo_alone_is_planned_too(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "ppo.yaml").write_text(
        json.dumps(
            {
                "name": "alone",
                "model": {**{k: v for k, v in tiny.TREE["model"].items() if k != "scratch"}, "source": "x"},
                "data": tiny.TREE["data"],
                "endpoints": {"paid": PAID},
                "critics": {"rater": {"endpoint": "paid", "critic": "rating_1_10"}},
                "rewards": {"judge": {"critic": "rater"}},
                "ppo": {**tiny_rl.PPO, "value_init": "policy"},
            }
        )
    )  # fmt: skip
    assert main(["label", "plan", str(tmp_path / "ppo.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["calls"] == 2 * 8 + 3 * 8
    assert found["nanos"] > 0

    def began(*_, **__):
        raise StageError("the run began")

    monkeypatch.setattr("laif_jax.studies.ppo.prompts_stage.run", began)
    assert main(["ppo", str(tmp_path / "ppo.yaml"), f"out={tmp_path / 'runs'}"]) == 2
    said = capsys.readouterr()
    assert "the run began" in said.err
    assert "planned, before anything is sent" in said.out
    assert json.loads((tmp_path / "runs" / "alone" / "plan.json").read_text())["nanos"] == found["nanos"]
    trained = Path(__file__).parents[2] / "configs" / "reward_smollm2.yaml"
    assert main(["label", "plan", str(trained)]) == 0
    assert "No other model is asked" in capsys.readouterr().out


def test_the_agreement_with_people_and_drift_probes_are_counted(tmp_path) -> None:
    people = tmp_path / "people.jsonl"
    write_jsonl(
        people,
        [{"source": "s", "prompt": f"Q{i}", "a": "x", "b": "y", "human": [1]} for i in range(7)],
    )
    rows = planned(tmp_path, evaluation__agreement=str(people), labeling={"probe": "shipped"})
    assert rows["agreement strong"].calls == 14
    assert (
        rows["probe strong"].calls == 40 + 40
    )  # put to the critic and to the judge, both of the endpoint `strong`


def test_an_old_price_and_an_unknown_one_are_told(tmp_path, monkeypatch) -> None:
    endpoints = {**tiny.TREE["endpoints"], "strong": PAID}
    config = tiny.config(tmp_path, endpoints=endpoints)

    class Late(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Late":
            return cls(2031, 1, 1, tzinfo=tz)

    monkeypatch.setattr(planning.datetime, "datetime", Late)
    shown = show_plan(plan_study(config))
    assert "gpt-4.1-mini: this price is of 2026-06-30" in shown
    assert "check it" in shown
    monkeypatch.undo()
    unknown = {**endpoints, "strong": {**PAID, "model": "gpt-99"}}
    plan = plan_study(tiny.config(tmp_path, endpoints=unknown))
    assert plan.nanos is None
    assert "gpt-99: its price is not known" in show_plan(plan)


def test_dollars_are_those_of_single_calls() -> None:
    """A price that rises with a call's length does not rise with the number of calls."""
    row = PlanRow("critic", "x", "gemini", EndpointSpec(provider="google", model="gemini-2.5-pro"))
    row.add(1000, 1000, 10)
    one = PlanRow("critic", "x", "gemini", row.spec)
    one.add(1, 1000, 10)
    assert one.nanos is not None
    assert row.nanos == 1000 * one.nanos
    thinking = EndpointSpec(provider="google", model="gemini-2.5-pro", options={"maxOutputTokens": 2000})
    longer = PlanRow("critic", "x", "gemini", thinking)
    longer.add(1, 1000, 10)
    assert longer.completion_tokens == 2000
    batch = PlanRow("critic", "x", "g", row.spec.model_copy(update={"batch": True}))
    batch.add(1, 1000, 10)
    assert batch.nanos == pytest.approx(one.nanos / 2, abs=1)
    assert batch.seconds == planning.BATCH_SECONDS
    assert any("in parts" in why for why in planning.Plan([row, batch], []).reasons)
    assert not any("in parts" in why for why in planning.Plan([row], []).reasons)
