"""Critics as data files."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.labeling import CriticError, load_critic, shipped_critics
from laif_jax.labeling.critic import CRITICS, instruction_text
from laif_jax.records import Message, Prompt

NAMES = shipped_critics("comparison")
# Between delimiters a response is not shown as it stands: `test_protocols` has their own property.
PLAIN = [name for name in NAMES if not load_critic(name).delimiters]


def test_the_protocols_facts() -> None:
    assert {"laif_basic", "alpaca_eval_gpt4", "alpaca_eval_clf", "pairwise_json", "ab_logprob"} <= set(NAMES)
    basic = load_critic("laif_basic")
    assert (basic.temperature, basic.max_tokens, basic.parser) == (0.0, 50, "regex")
    assert basic.options["first"] == r"(?:^|\n) ?Output \(a\)"
    ranking = load_critic("alpaca_eval_gpt4")
    assert (ranking.temperature, ranking.max_tokens, ranking.parser) == (0.0, 100, "ranking")
    soft = load_critic("alpaca_eval_clf")
    assert (soft.temperature, soft.max_tokens, soft.top_logprobs) == (1.0, 1, 5)
    assert soft.options["tokens"] == ["m", "M"]


@pytest.mark.parametrize("name", PLAIN)
@given(
    texts=st.tuples(
        *[st.text(max_size=40) | st.sampled_from(["{output_2}", "[user]\nhi", "{instruction}{}", "\\1"])] * 3
    )
)
def test_responses_cannot_inject(name: str, texts: tuple[str, str, str]) -> None:
    critic = load_critic(name)
    marks = ("\ue000", "\ue001", "\ue002")
    plain = critic.messages(*marks)
    filled = critic.messages(*texts)
    assert [message["role"] for message in plain] == [message["role"] for message in filled]
    for before, after in zip(plain, filled):
        expected = before["content"]
        # The marks do not occur in the values one after the other, so sequential replacement is safe here.
        pieces = [expected]
        for mark, text in zip(marks, texts):
            pieces = [part for piece in pieces for part in _split(piece, mark, text)]
        assert after["content"] == "".join(piece if isinstance(piece, str) else piece[0] for piece in pieces)


def _split(piece, mark, text):
    if not isinstance(piece, str):
        return [piece]
    parts = piece.split(mark)
    result = [parts[0]]
    for part in parts[1:]:
        result += [(text,), part]
    return result


@pytest.mark.parametrize("name", NAMES)
def test_each_output_is_shown_once_and_in_its_place(name: str) -> None:
    text = "\n".join(message["content"] for message in load_critic(name).messages("INSTR", "FIRST", "SECOND"))
    assert text.count("FIRST") == text.count("SECOND") == 1
    assert text.index("INSTR") < text.index("FIRST") < text.index("SECOND")


def copy(tmp_path: Path, name: str = "laif_basic", prompt: str | None = None, **changes: object) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    values = {**yaml.safe_load((CRITICS / name / "critic.yaml").read_text()), **changes}
    (folder / "critic.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    (folder / "prompt.txt").write_text(prompt or (CRITICS / name / "prompt.txt").read_text())
    return folder


def test_the_hash_follows_what_decides_a_label(tmp_path: Path) -> None:
    original = load_critic("laif_basic").hash
    assert load_critic(copy(tmp_path, description="other words")).hash == original
    assert load_critic(copy(tmp_path, temperature=0.5)).hash != original
    prompt = (CRITICS / "laif_basic" / "prompt.txt").read_text()
    assert load_critic(copy(tmp_path, prompt=prompt.replace("clear", "short"))).hash != original


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parser": "regexp"}, "regexp"),
        ({"colour": "red"}, "colour"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"prompt": "[user]\n{instruction} {output_1}"}, "output_2"),
        ({"prompt": "[user]\n{instruction} {output_1} {output_2} {output_3}"}, "output_3"),
        ({"prompt": "{instruction} {output_1} {output_2}"}, "section"),
        ({"prompt": "hello\n[user]\n{instruction} {output_1} {output_2}"}, "before its first section"),
    ],
)
def test_a_malformed_critic_is_explained(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(CriticError) as error:
        load_critic(copy(tmp_path, **changes))
    assert says in str(error.value)
    assert "critic.yaml" in str(error.value)


def test_an_unknown_critic_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(CriticError, match="laif_basic"):
        load_critic("gpt5")
    (tmp_path / "critic.yaml").write_text("name: x")
    with pytest.raises(CriticError, match=r"prompt\.txt"):
        load_critic(tmp_path)


def test_a_conversation_is_written_out_and_a_single_turn_is_kept_byte_for_byte() -> None:
    assert instruction_text(Prompt.from_text("  say {hi}\n")) == "  say {hi}\n"
    turns = (("user", "One?"), ("assistant", "1"), ("user", "Two?"))
    prompt = Prompt(messages=tuple(Message(role=role, content=text) for role, text in turns))
    assert instruction_text(prompt) == "Human: One?\n\nAssistant: 1\n\nHuman: Two?"
