"""Servers of local models."""

import os
from pathlib import Path

import pytest

from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling import EndpointError, running, start_llama_cpp, start_service
from laif_jax.labeling.local_servers import _folder_id
from laif_jax.records import Comparison, Completion, Prompt, Status


def gguf() -> str:
    path = os.environ.get("LAIF_SMOLLM2_GGUF", "")
    if not path or not Path(path).is_file():
        pytest.skip("LAIF_SMOLLM2_GGUF does not name the SmolLM2-135M GGUF file")
    pytest.importorskip("xllamacpp")
    return path


def test_a_missing_model_is_explained(tmp_path) -> None:
    with (
        pytest.raises(EndpointError, match="laif fetch"),
        running(EndpointSpec(provider="llama_cpp", gguf="no.gguf")),
    ):
        pass
    spec = EndpointSpec(provider="checkpoint", checkpoint=str(tmp_path))
    with pytest.raises(EndpointError, match=r"config\.json"), running(spec):
        pass


def test_a_checkpoints_identity_is_its_content(tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert _folder_id(tmp_path / "one") == _folder_id(tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").write_bytes(b"other weights")
    assert _folder_id(tmp_path / "one") != _folder_id(tmp_path / "two")


def test_a_simulated_endpoint_needs_no_server() -> None:
    spec = EndpointSpec.model_validate({"provider": "simulated", "simulated": {}})
    with running(spec) as endpoint:
        assert endpoint.provider == "simulated"


@pytest.mark.real
def test_llama_cpp_as_critic_and_teacher(tmp_path) -> None:
    spec = EndpointSpec(
        provider="llama_cpp", gguf=gguf(), model="smollm2-135m", concurrency=2, context_length=1024
    )
    prompt = Prompt.from_text("Name a fruit.")
    pair = [
        Completion(prompt_id=prompt.id, generator=name, text=name)
        for name in ("An apple.", "A stone, a brick.")
    ]
    items = [Comparison(prompt=prompt, a=pair[0], b=pair[1])]
    with start_service(tmp_path) as service, service.client() as client:
        with running(spec) as endpoint:
            first = client.judge(endpoint, "ab_logprob", items)
            (answer,) = client.complete(
                endpoint, [prompt], generator="smollm2", max_tokens=8, temperature=0.0
            )
            assert answer.text
            assert answer.usage.completion_tokens > 0
        parts = client.judgements(client.last_job) or first
        assert all(j.status in (Status.OK, Status.TIE) for j in first)
        assert 0.0 < first[0].p_b < 1.0
        assert len(parts) >= 1
        # Started again, on another port, the same weights are the same endpoint: nothing is asked.
        with running(spec) as endpoint:
            assert client.judge(endpoint, "ab_logprob", items) == first
            assert client.status(client.last_job).calls == 0


@pytest.mark.real
def test_a_file_that_is_no_model_ends_with_the_servers_own_words(tmp_path) -> None:
    from laif_jax.labeling import LabelServiceError

    gguf()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    spec = EndpointSpec(provider="llama_cpp", gguf=str(broken))
    with pytest.raises(LabelServiceError, match=r"broken\.gguf"), start_llama_cpp(spec):
        pass
