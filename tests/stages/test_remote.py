"""A study whose labelling service runs elsewhere: that has the keys, and asks only what its operator listed."""

import json

import pytest
from etils import epath

from laif_jax.labeling.errors import EndpointError, LabelServiceError
from laif_jax.stages import prompts, teach
from laif_jax.stages.artifact import StageError
from laif_jax.stages.context import Services, StudyContext
from tests.labeling.face_server import TOKEN, served
from tests.labeling.helpers import Reply, chat, fake_endpoint
from tests.studies import tiny

KEY = "a-key-that-only-the-service-has"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """(address of a service with a token, the server that it asks)."""
    monkeypatch.setenv("STUDYS_TOKEN", TOKEN)
    with fake_endpoint(lambda number, request: Reply(body=chat(f"answer {number}"))) as server:
        listed = {"provider": "openai", "base_url": server.url, "model": "big", "api_key_env": "SERVICES_KEY"}
        file = tmp_path / "endpoints.yaml"
        file.write_text(json.dumps({"endpoints": {"big": listed}}))
        options = ("--host", "0.0.0.0", "--endpoints", str(file), "--token-env", "SERVICES_TOKEN")
        env = {"SERVICES_TOKEN": TOKEN, "SERVICES_KEY": KEY}
        with served(tmp_path / "store", *options, env=env) as (url, _):
            yield url, server


def study(folder, url: str, endpoint: dict) -> StudyContext:
    config = tiny.config(
        folder,
        endpoints={**tiny.TREE["endpoints"], "big": endpoint},
        teachers={**tiny.TREE["teachers"], "big": {"endpoint": "big"}},
        labeling={"url": url, "token_env": "STUDYS_TOKEN", "poll": 0.05, "max_wait": 0.0},
    )
    return StudyContext(config, epath.Path(folder), 0, Services(config, epath.Path(folder)))


def taught(ctx: StudyContext, teacher: str):
    with ctx.services:
        return teach.read(teach.run(ctx, prompts.run(ctx), teacher=teacher, split="train", stop=4))


def test_a_study_without_keys_is_answered(remote, tmp_path):
    url, server = remote
    plain = {"provider": "openai", "base_url": server.url + "/", "model": "big", "concurrency": 2}
    assert len(taught(study(tmp_path / "study", url, plain), "big")) == 4
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert len(taught(study(tmp_path / "other", url, plain), "weak")) == 4  # simulated ones need no entry
    for path in (tmp_path / "study").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_a_study_that_asks_for_more_is_told_so(remote, tmp_path):
    url, server = remote
    dearer = {"provider": "openai", "base_url": server.url, "model": "biggest"}
    with pytest.raises((StageError, LabelServiceError), match=r"403.*big \(big at http.*--endpoints FILE"):
        taught(study(tmp_path / "study", url, dearer), "big")
    assert not server.calls


def test_a_model_server_of_this_machine_is_of_no_use_to_a_service_elsewhere(tmp_path):
    local = {"provider": "checkpoint", "checkpoint": str(tmp_path / "model")}
    with study(tmp_path / "study", "http://labels.example:8080", local).services as services:
        with pytest.raises(StageError, match=r"endpoints\.big.*laif serve model"):
            services.endpoint("big")
        assert services.endpoint("weak").provider == "simulated"
    near = study(tmp_path / "other", "http://127.0.0.1:8080", local)
    with (
        near.services as services,
        pytest.raises(EndpointError, match=r"no model folder"),
    ):  # it is looked for
        services.endpoint("big")
