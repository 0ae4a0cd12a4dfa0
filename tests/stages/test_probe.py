"""Drift probes end to end: a stage puts them, over HTTP, to a service in a process of its own; the report tells."""

from typing import Any

import pytest

from laif_jax.cli.main import main
from laif_jax.config import CriticSpec
from laif_jax.labeling import probe
from laif_jax.labeling.probe import SHIPPED, probe_set
from laif_jax.labeling.service import start_service
from laif_jax.records import Comparison, Completion, Prompt
from laif_jax.stages import label
from tests.labeling.helpers import Reply, chat, fake_endpoint
from tests.studies import tiny

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")


def comparisons(count: int = 3) -> list[Comparison]:
    prompts = [Prompt.from_text(f"question {i}") for i in range(count)]
    return [
        Comparison(
            prompt=prompt,
            a=Completion(
                prompt_id=prompt.id, generator="a", text="x " + prompt.instruction, meta={"quality": 0.2}
            ),
            b=Completion(
                prompt_id=prompt.id, generator="b", text="y " + prompt.instruction, meta={"quality": 0.9}
            ),
        )
        for prompt in prompts
    ]


class Lab:
    """The labels of a critic, asked for on several days; the same comparisons each time."""

    def __init__(self, make, folder, monkeypatch) -> None:
        self.make, self.folder, self.monkeypatch = make, folder, monkeypatch

    def run(self, day: str, endpoint: dict[str, Any], critic: str = "ab_logprob") -> None:
        self.monkeypatch.setattr(probe, "today", lambda: day)
        ctx = self.make(
            endpoints={**tiny.TREE["endpoints"], "judge": endpoint},
            labeling={"poll": 0.02, "max_wait": 0.0, "probe": SHIPPED},
        )
        # A service of this run alone, on the store of all of them.
        with start_service(self.folder) as service, service.client() as client:
            ctx.services.__dict__["client"] = client
            found = label.judge(
                ctx, CriticSpec(endpoint="judge", critic=critic, order="seeded"), comparisons()
            )
        assert all(judgement.p_b is not None for judgement in found)

    def report(self, capsys) -> list[str]:
        """The lines of `laif label quality` that speak of drift."""
        capsys.readouterr()
        assert main(["label", "quality", "--store", str(self.folder), "--samples", "50"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "drift" in line.lower()]


@pytest.fixture
def lab(make, tmp_path, monkeypatch) -> Lab:
    return Lab(make, tmp_path / "labels", monkeypatch)


def simulated(version: int = 0, drift: float = 0.5) -> dict[str, Any]:
    spec = {"world": "planted", "accuracy": 0.8, "drift": drift, "version": version}
    return {"provider": "simulated", "model": "sim", "simulated": spec}


def test_planted_drift_is_told(lab, capsys):
    lab.run(DAYS[0], simulated())
    lab.run(DAYS[1], simulated())
    calm = lab.report(capsys)
    assert any(f"{DAYS[1]} against {DAYS[0]}: same verdict 100" in line for line in calm), calm
    assert not [line for line in calm if line.startswith("Warning")]
    lab.run(DAYS[2], simulated(version=1))
    changed = [line for line in lab.report(capsys) if line.startswith("Warning")]
    assert any("verdicts on the probe set" in line and DAYS[2] in line for line in changed), changed
    assert any("calls itself" in line for line in changed)
    assert not any(f"and {DAYS[1]}" in line for line in changed)


def test_a_model_that_changes_behind_its_name_is_found_by_its_answers(lab, capsys):
    """Over HTTP twice: the service asks a real server, which names the same model and fingerprint on all days."""
    likes = {"longer": True}

    def reply(number: int, request: dict) -> Reply:
        text = request["messages"][-1]["content"]
        first, second = (
            text.partition("Response A:\n")[2].split("\n\nAnswer with")[0].split("\n\nResponse B:\n")
        )
        prefers_first = (len(first) > len(second)) == likes["longer"]
        top = {"A": -0.1, "B": -2.4} if prefers_first else {"A": -2.4, "B": -0.1}
        return Reply(body=chat("A" if prefers_first else "B", top=top))

    count = 2 * len(probe_set(SHIPPED))
    with fake_endpoint(reply) as server:
        endpoint = {"provider": "openai", "model": "m", "base_url": server.url, "client": "plain"}
        lab.run(DAYS[0], endpoint)
        assert sum(server.calls.values()) == count + 3
        lab.run(DAYS[1], endpoint)
        assert sum(server.calls.values()) == 2 * count + 3  # only the probe is asked again
        assert not [line for line in lab.report(capsys) if line.startswith("Warning")]
        likes["longer"] = False
        lab.run(DAYS[2], endpoint)
        assert sum(server.calls.values()) == 3 * count + 3
    warnings = [line for line in lab.report(capsys) if line.startswith("Warning")]
    assert any("verdicts on the probe set" in line and DAYS[2] in line for line in warnings), warnings
    assert not any("calls itself" in line for line in warnings)
