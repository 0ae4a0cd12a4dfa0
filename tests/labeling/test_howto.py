"""docs/how-to/label.md, walked: its commands give what it says, and its provider blocks work."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from laif_jax.cli.main import main
from laif_jax.config.load import load_label_config
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.pairs_example import EXAMPLE, write_example
from laif_jax.labeling.pairs_plan import plan_pairs
from laif_jax.records import read_jsonl
from tests.labeling.wire_server import BODIES, Request, Response, serve

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "label.md").read_text("utf-8")
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks() -> list[dict[str, Any]]:
    """Every endpoint that the page shows for a paid run, and every one in the example's comments."""
    text = section("A paid run")
    first = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["endpoint"]  # ty: ignore[not-subscriptable]
    others = [yaml.safe_load(found) for found in re.findall(r"\| `(\{provider.*?\})` \|", text)]
    commented = EXAMPLE.read_text("utf-8").split("# endpoint: ")[1:]
    return [first, *others, *(yaml.safe_load(text.replace("\n#", "\n")) for text in commented)]


def test_from_nothing_to_a_hundred_labelled_pairs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = section("100 pairs, nobody paid")
    commands = re.findall(r"^    laif (label .*?)(?: +#.*)?$", text, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["example", "plan", "run"]
    said = ""
    for command in commands:
        assert main(command.split()) == 0
        said += capsys.readouterr().out
    shown = [line[4:].strip() for line in text.splitlines() if line.startswith("    ")]
    lines = [line.strip() for line in said.splitlines()]
    missing = [line for line in shown if line and not line.startswith("laif ") and line not in lines]
    assert not missing, f"the page shows what the program does not say: {missing}"
    assert len(list(read_jsonl("labels.jsonl"))) == 100
    assert {path.name for path in Path("labels-report").iterdir()} >= {
        "plan.json",
        "results.json",
        "quality.html",
    }
    assert main(["label", "run", "label.yaml"]) == 0
    assert "0 calls made, 200 answers from the store" in capsys.readouterr().out
    fields = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    named = {name for cell in fields for name in re.findall(r"`(\w+)`", cell)} - {"tier"}
    assert named <= set(next(iter(read_jsonl("labels.jsonl"))))


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block['provider']}-{block.get('model', '')}")
def test_every_provider_block_is_planned_with_a_price(block: dict[str, Any], tmp_path, monkeypatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)  # a plan sends nothing
    if block["provider"] == "llama_cpp":
        block = {**block, "gguf": str(tmp_path / "model.gguf")}
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
    path = configured(tmp_path, block, budget="5USD")
    plan = plan_pairs(load_label_config(path))
    assert plan.rows[0].calls == 20
    assert plan.nanos is not None
    paid = block["provider"] != "llama_cpp" and block.get("prompt_price") != 0
    assert (plan.nanos > 0) == paid
    if paid:
        half = plan_pairs(load_label_config(path, ["endpoint.batch=true"]))
        assert half.nanos is not None
        assert half.nanos == pytest.approx(plan.nanos / 2, abs=20)


def configured(folder: Path, endpoint: dict[str, Any], **changes: Any) -> str:
    """The example's configuration with another block in it."""
    if not (folder / "pairs.jsonl").exists():
        write_example(folder, 10)
    tree = yaml.safe_load(EXAMPLE.read_text("utf-8")) | {"endpoint": endpoint}
    tree["pairs"]["path"] = str(folder / "pairs.jsonl")
    tree["labels"] = str(folder / "labels.jsonl")
    tree["labeling"] = {"store": str(folder / "labels"), "poll": 0.02}
    path = folder / "paid.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return str(path)


@pytest.mark.parametrize("provider", ["openai", "anthropic", "google"])
def test_a_paid_run_is_another_block_and_nothing_else(provider: str, tmp_path, monkeypatch, capsys) -> None:
    block = next(found for found in blocks() if found["provider"] == provider)
    key = f"sk-test-{provider}-0123456789"
    monkeypatch.setenv(block["api_key_env"], key)

    def answer(request: Request) -> Response:
        return Response(body=BODIES[provider]("Output (b)"))

    with serve(answer) as server:
        url = f"{server.url}/v1" if provider == "openai" else server.url
        prices = {"prompt_price": 0.4, "completion_price": 1.6}
        path = configured(tmp_path, {**block, "base_url": url, **prices})
        assert main(["label", "run", path, "order=seeded"]) == 0
        assert len(server.requests) == 10
        assert any(key in str(request.headers) for request in server.requests)
    said = capsys.readouterr().out
    assert "10 calls made" in said
    rows = list(read_jsonl(tmp_path / "labels.jsonl"))
    assert {row["p_b"] for row in rows} == {0.0, 1.0}
    assert {row["model"] for row in rows} == {block["model"]}
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert key.encode() not in file.read_bytes()


def test_the_example_of_two_tiers_is_planned(tmp_path) -> None:
    text = re.search(r"```yaml\n(.*?)```", section("A cheap critic first"), re.DOTALL)
    assert text is not None
    openai = blocks()[0]
    plan = plan_pairs(load_label_config(configured(tmp_path, openai, **yaml.safe_load(text[1]))))
    assert [row.critic for row in plan.rows] == ["ab_logprob", "pairwise_json"]
    assert plan.rows[1].at_most
    assert plan.nanos is not None
    claude = yaml.safe_load(text[1])["strong"]["endpoint"]
    with pytest.raises(EndpointError, match=r"critic 'ab_logprob' at .*log-probs"):
        plan_pairs(load_label_config(configured(tmp_path, claude, critic="ab_logprob")))


def test_the_settings_of_your_own_pairs_are_read(tmp_path) -> None:
    text = re.search(r"```yaml\n(.*?)```", section("Your own pairs"), re.DOTALL)
    assert text is not None
    path = configured(tmp_path, blocks()[0], **yaml.safe_load(text[1]))
    pairs = load_label_config(path).pairs
    assert (pairs.prompt, pairs.a, pairs.b, pairs.label, pairs.limit) == (
        "instruction",
        "output_1",
        "output_2",
        "human",
        200,
    )
