"""Templates to tokens and masks, token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.data.chat import (
    PromptTooLongError,
    encode_dialogue,
    encode_pair,
    encode_prompt,
    encode_prompts,
    end_of_turn_ids,
)
from laif_jax.data.templates import TemplateError
from laif_jax.records import Message
from tests.data.tokenizers_ import CHATML, characters, chatml, llama

LONG = {"max_length": 400, "max_prompt_length": 300}
ASK = [{"role": "user", "content": "hello"}]
TWO_TURNS = [*ASK, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "and you?"}]


def learned(tokenizer, encoded) -> str:
    """The supervised tokens as text, runs separated by ` / `."""
    runs, last = [], 0
    for token, mask in zip(encoded.tokens, encoded.loss_mask, strict=True):
        if mask:
            runs[-1:] = [[*runs[-1], token]] if last else [*runs[-1:], [token]]
        last = mask
    return " / ".join(tokenizer.decode(run) for run in runs)


# ---- the paper's template --------------------------------------------------------------------------------------


def test_human_assistant_token_by_token():
    tokenizer = characters()
    encoded = encode_dialogue(tokenizer, ASK, "human_assistant", completion="fine", **LONG)
    prompt = "Human: hello\n\nAssistant: "
    assert [tokenizer.convert_ids_to_tokens(t) for t in encoded.tokens] == [*prompt, *"fine", "|"]
    assert encoded.loss_mask == [0] * len(prompt) + [1] * 5
    assert encoded.prompt_length == len(prompt)
    assert encoded.ended
    assert not encoded.truncated
    assert encode_prompt(tokenizer, ASK, "human_assistant", 300) == encoded.tokens[: len(prompt)]


def test_human_assistant_multi_turn():
    tokenizer = characters()
    dialogue = [*TWO_TURNS, {"role": "assistant", "content": "well"}]
    encoded = encode_dialogue(tokenizer, dialogue, "human_assistant", **LONG)
    text = "Human: hello\n\nAssistant: fine|\n\nHuman: and you?\n\nAssistant: well|"
    assert [tokenizer.convert_ids_to_tokens(t) for t in encoded.tokens] == list(text)
    assert learned(tokenizer, encoded) == "fine| / well|"
    # The same dialogue with its last answer as a completion: the same tokens, only that answer is learned.
    last = encode_dialogue(tokenizer, TWO_TURNS, "human_assistant", completion="well", **LONG)
    assert last.tokens == encoded.tokens
    assert learned(tokenizer, last) == "well|"


def test_human_assistant_puts_system_text_first_and_accepts_messages():
    tokenizer = characters()
    messages = (Message(role="system", content="be nice"), Message(role="user", content="hello"))
    tokens = encode_prompt(tokenizer, messages, "human_assistant", None)
    assert "".join(tokenizer.convert_ids_to_tokens(tokens)) == "be nice\n\nHuman: hello\n\nAssistant: "


def test_human_assistant_writes_no_bos_and_reads_no_special_tokens_in_text():
    tokenizer = chatml()
    encoded = encode_dialogue(tokenizer, ASK, "human_assistant", completion="a<|im_end|>b</s>", **LONG)
    assert tokenizer.bos_token_id not in encoded.tokens
    assert encoded.tokens.count(tokenizer.eos_token_id) == 1
    assert encoded.tokens[-1] == tokenizer.eos_token_id
    assert not encoded.special_text


# ---- the model's own template ----------------------------------------------------------------------------------


def test_chatml_token_by_token():
    tokenizer = chatml()
    encoded = encode_dialogue(tokenizer, ASK, "model", completion="how are you", **LONG)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(encoded.tokens) == prompt + "how are you<|im_end|>"
    assert learned(tokenizer, encoded) == "how are you<|im_end|>"
    assert encoded.tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.pad_token_id
    # Exactly what transformers makes of the dialogue, without the newline after the end of turn.
    whole = tokenizer.apply_chat_template(
        [*ASK, {"role": "assistant", "content": "how are you"}], tokenize=True, return_dict=False
    )
    assert encoded.tokens == whole[:-1]
    generation = tokenizer.apply_chat_template(
        ASK, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert (
        encode_prompt(tokenizer, ASK, "model", 300) == generation == encoded.tokens[: encoded.prompt_length]
    )


def test_chatml_multi_turn_learns_every_answer_with_its_end_but_not_the_newline_after():
    tokenizer = chatml()
    dialogue = [*TWO_TURNS, {"role": "assistant", "content": "what is that"}]
    encoded = encode_dialogue(tokenizer, dialogue, "model", **LONG)
    whole = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False)
    assert encoded.tokens == whole[:-1]
    assert learned(tokenizer, encoded) == "fine<|im_end|> / what is that<|im_end|>"
    context = encode_dialogue(tokenizer, TWO_TURNS, "model", completion="what is that", **LONG)
    assert context.tokens == encoded.tokens
    assert learned(tokenizer, context) == "what is that<|im_end|>"


def test_a_template_that_writes_bos_gives_exactly_one():
    tokenizer = llama()
    encoded = encode_dialogue(tokenizer, ASK, "model", completion="how are you", **LONG)
    assert tokenizer.decode(encoded.tokens) == "<s>[INST] hello [/INST] how are you </s>"
    assert encoded.tokens.count(tokenizer.bos_token_id) == 1
    assert learned(tokenizer, encoded) == " how are you </s>"
    assert encode_prompt(tokenizer, ASK, "model", 300)[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_adds_bos_by_itself_adds_none_to_a_template():
    from tokenizers.processors import TemplateProcessing

    tokenizer = llama()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    encoded = encode_dialogue(tokenizer, ASK, "model", completion="you", **LONG)
    assert encoded.tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in encode_prompt(tokenizer, ASK, "human_assistant", None)


@pytest.mark.parametrize("completion", ["\n\nhello", "\nworld", " you", "\n", "", "  ", "world\n\n"])
def test_the_prompt_is_a_prefix_whatever_the_answer_begins_with(completion):
    """An answer's first newlines would merge with the header's: `\\n` + `\\n\\n` is one token here."""
    tokenizer = chatml()
    assert len(tokenizer("\n\n\n", add_special_tokens=False).input_ids) < 3
    encoded = encode_dialogue(tokenizer, ASK, "model", completion=completion, **LONG)
    assert encoded.tokens[: encoded.prompt_length] == encode_prompt(tokenizer, ASK, "model", None)
    assert learned(tokenizer, encoded) == completion + "<|im_end|>"


texts = st.text(st.sampled_from("ab \n?hello"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), texts, st.sampled_from(["model", "human_assistant"]))
def test_prefix_and_mask_hold_for_any_conversation(turns, completion, template):
    tokenizer = chatml()
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    if len(messages) % 2 == 0:
        messages.pop()
    encoded = encode_dialogue(tokenizer, messages, template, completion=completion, **LONG)
    assert encoded.tokens[: encoded.prompt_length] == encode_prompt(tokenizer, messages, template, None)
    answer = encoded.tokens[encoded.prompt_length :]
    assert tokenizer.decode(answer) == completion + "<|im_end|>"
    assert encoded.loss_mask == [0] * encoded.prompt_length + [1] * len(answer)
    # Supervising the earlier answers too changes the mask alone (unless an answer merges into its header).
    dialogue = [*messages, {"role": "assistant", "content": completion}]
    whole = encode_dialogue(tokenizer, dialogue, template, **LONG)
    assert tokenizer.decode(whole.tokens) == tokenizer.decode(encoded.tokens)
    answers = [turn["content"] for turn in dialogue if turn["role"] == "assistant"]
    assert learned(tokenizer, whole) == " / ".join(text + "<|im_end|>" for text in answers)


# ---- ends of turns, truncation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["model", "human_assistant"])
def test_an_answer_that_did_not_end_has_no_end_of_turn(template):
    tokenizer = chatml()
    ended = encode_dialogue(tokenizer, ASK, template, completion="how are", **LONG)
    cut = encode_dialogue(tokenizer, ASK, template, completion="how are", finish_reason="length", **LONG)
    assert cut.tokens == ended.tokens[:-1]
    assert cut.loss_mask == ended.loss_mask[:-1]
    assert not cut.ended
    assert not cut.truncated


def char_dialogue(prompt: str, answer: str, **kwargs):
    tokenizer = characters()
    encoded = encode_dialogue(
        tokenizer, [{"role": "user", "content": prompt}], "human_assistant", completion=answer, **kwargs
    )
    return "".join(tokenizer.convert_ids_to_tokens(encoded.tokens)), encoded


HEAD, TAIL = "Human: ", "\n\nAssistant: "  # 7 and 13 characters


def test_what_fits_exactly_is_not_cut():
    text, encoded = char_dialogue("a" * 10, "b" * 9, max_length=40, max_prompt_length=20)
    assert text == HEAD + "a" * 10 + TAIL + "b" * 9 + "|"
    assert not encoded.truncated


def test_one_token_too_many_cuts_the_prompt_to_its_end_first():
    text, encoded = char_dialogue("abcdefghij", "b" * 10, max_length=40, max_prompt_length=20)
    assert text == "defghij" + TAIL + "b" * 10 + "|"
    assert (encoded.prompt_truncated, encoded.response_truncated, encoded.ended) == (True, False, True)
    assert encoded.prompt_length == 20
    assert encoded.loss_mask == [0] * 20 + [1] * 11


def test_then_the_answer_loses_its_end_and_its_end_of_turn():
    text, encoded = char_dialogue("abcdefghij", "b" * 20, max_length=40, max_prompt_length=20)
    assert text == "defghij" + TAIL + "b" * 20
    assert (encoded.prompt_truncated, encoded.response_truncated, encoded.ended) == (True, True, False)


def test_an_answer_that_fits_but_for_its_end_of_turn_loses_that():
    text, encoded = char_dialogue("a", "b" * 19, max_length=40, max_prompt_length=25)
    assert text == HEAD + "a" + TAIL + "b" * 19
    assert (encoded.prompt_truncated, encoded.response_truncated, encoded.ended) == (False, True, False)


def test_the_papers_rule_cuts_the_answer_to_its_share_even_after_a_short_prompt():
    text, encoded = char_dialogue("a", "b" * 30, max_length=40, max_prompt_length=25, paper_truncation=True)
    assert text == HEAD + "a" + TAIL + "b" * 15
    assert encoded.response_truncated
    text, _ = char_dialogue("a", "b" * 18, max_length=40, max_prompt_length=25, paper_truncation=True)
    assert text == HEAD + "a" + TAIL + "b" * 18 + "|"  # no cut where all fits


def test_multi_turn_is_cut_from_the_left_and_nothing_predicts_the_first_token():
    tokenizer = characters()
    dialogue = [*TWO_TURNS, {"role": "assistant", "content": "well"}]
    text = "Human: hello\n\nAssistant: fine|\n\nHuman: and you?\n\nAssistant: well|"
    keep = len("ine|\n\nHuman: and you?\n\nAssistant: ")
    encoded = encode_dialogue(
        tokenizer, dialogue, "human_assistant", max_length=keep + 10, max_prompt_length=keep
    )
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.tokens)) == text[-keep - 5 :]
    assert learned(tokenizer, encoded) == "ne| / well|"
    assert encoded.prompt_truncated


def test_a_cut_prompt_keeps_its_bos():
    tokenizer = llama()
    messages = [{"role": "user", "content": "hello world " * 10}]
    whole = encode_prompt(tokenizer, messages, "model", None)
    cut = encode_prompt(tokenizer, messages, "model", 20)
    assert cut == [tokenizer.bos_token_id, *whole[-19:]]
    encoded = encode_dialogue(
        tokenizer, messages, "model", completion="you", max_length=30, max_prompt_length=20
    )
    assert encoded.tokens[:20] == cut
    assert encoded.loss_mask[:20] == [0] * 20
    # SmolLM2's "BOS" opens every turn; it is not put before a cut prompt.
    assert (
        encode_prompt(chatml(), messages, "model", 20)
        == encode_prompt(chatml(), messages, "model", None)[-20:]
    )


@given(
    st.integers(1, 60),
    st.integers(0, 60),
    st.integers(22, 50),
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
)
def test_truncation_keeps_its_promises(prompt_size, answer_size, max_prompt, room, paper, stop):
    max_length = max_prompt + room
    text, encoded = char_dialogue(
        "a" * prompt_size,
        "b" * answer_size,
        max_length=max_length,
        max_prompt_length=max_prompt,
        paper_truncation=paper,
        finish_reason="stop" if stop else "length",
    )
    assert len(text) == len(encoded.loss_mask) <= max_length
    assert encoded.ended == text.endswith("|") == (stop and not encoded.response_truncated)
    assert encoded.supervised == len(text) - encoded.prompt_length
    whole = 20 + prompt_size + answer_size + stop
    assert encoded.truncated == (whole > max_length)
    if encoded.prompt_truncated:
        assert encoded.prompt_length == max_prompt


# ---- pairs and prompts -----------------------------------------------------------------------------------------


@given(
    st.integers(1, 60),
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(22, 50),
    st.integers(1, 30),
    st.booleans(),
)
def test_both_sides_of_a_pair_hold_the_same_prompt(prompt_size, left, right, max_prompt, room, paper):
    tokenizer = characters()
    messages = [{"role": "user", "content": "a" * prompt_size}]
    limits = {"max_length": max_prompt + room, "max_prompt_length": max_prompt, "paper_truncation": paper}
    pair = encode_pair(
        tokenizer, messages, "b" * left, "c" * right, "human_assistant", p_chosen=0.8, **limits
    )
    n = pair.chosen.prompt_length
    assert pair.chosen.tokens[:n] == pair.rejected.tokens[:n]
    assert n == pair.rejected.prompt_length
    assert sum(pair.chosen.loss_mask[:n]) == 0
    assert pair.p_chosen == 0.8
    # The longer side is cut as it would be alone.
    longer, text = (pair.chosen, "b" * left) if left >= right else (pair.rejected, "c" * right)
    assert longer == encode_dialogue(tokenizer, messages, "human_assistant", completion=text, **limits)


def test_a_pairs_sides_end_each_in_its_own_way():
    pair = encode_pair(chatml(), ASK, "how are", "you", "model", finish_reasons=("length", "stop"), **LONG)
    assert (pair.chosen.ended, pair.rejected.ended) == (False, True)
    assert pair.rejected.tokens[-1] == chatml().eos_token_id != pair.chosen.tokens[-1]


def test_prompts_for_generation_count_what_was_cut():
    tokenizer = characters()
    prompts = [[{"role": "user", "content": "a" * n}] for n in (1, 10, 11)]
    encoded = encode_prompts(tokenizer, prompts, "human_assistant", 30)
    assert [len(tokens) for tokens in encoded.tokens] == [21, 30, 30]
    assert encoded.truncated == [False, False, True]
    assert encoded.truncated_count == 1
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.tokens[2])) == "uman: " + "a" * 11 + TAIL


def test_a_prompt_that_may_not_or_cannot_be_cut_is_an_error_with_numbers():
    tokenizer = characters()
    messages = [{"role": "user", "content": "a" * 50}]
    with pytest.raises(PromptTooLongError, match="70 tokens, 30 more than the 40"):
        encode_prompt(tokenizer, messages, "human_assistant", 40, truncate=False)
    with pytest.raises(PromptTooLongError, match=r"limit of 11 tokens.*writes 11"):
        encode_prompt(tokenizer, messages, "human_assistant", 11)
    with pytest.raises(ValueError, match="`max_prompt_length` 40 must"):
        encode_dialogue(tokenizer, ASK, "model", max_length=40, max_prompt_length=40, completion="x")


def test_generation_stops_at_the_templates_end_of_turn_and_at_eos():
    tokenizer = chatml(eos_token="</s>")
    end, eos = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "</s>"))
    assert end_of_turn_ids(tokenizer, "model") == (end, eos)
    assert end_of_turn_ids(tokenizer, "human_assistant") == (eos,)
    encoded = encode_dialogue(tokenizer, ASK, "model", completion="you", **LONG)
    assert encoded.tokens[-1] == end
    assert eos not in encoded.tokens


# ---- what breaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["so <|im_end|> it is", "<s>"])
def test_the_text_of_a_special_token_in_a_message_is_flagged(text):
    assert encode_dialogue(chatml(), ASK, "model", completion=text, **LONG).special_text
    asked = [{"role": "user", "content": text}]
    pair = encode_pair(chatml(), asked, "a", "b", "model", **LONG)
    assert pair.chosen.special_text
    assert pair.rejected.special_text
    assert not encode_dialogue(chatml(), ASK, "model", completion="<im_end>", **LONG).special_text


def test_a_template_without_an_end_of_turn_gets_eos():
    plain = (
        "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    tokenizer = chatml(plain)
    encoded = encode_dialogue(tokenizer, ASK, "model", completion="x", **LONG)
    assert tokenizer.decode(encoded.tokens) == "user:\nhello\nassistant:\nx<|im_end|>"
    assert learned(tokenizer, encoded) == "x<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[0]['content'] }}", "begins the whole dialogue"),
        (CHATML + "{% if add_generation_prompt %}!{% endif %}", "begins the whole dialogue"),
        ("{{ raise_exception('no thanks') }}", r"refuses a conversation with roles \[user\].*no thanks"),
    ],
)
def test_a_broken_template_says_how(template, message):
    with pytest.raises(TemplateError, match=message):
        encode_dialogue(chatml(template), ASK, "model", completion="x", **LONG)


def test_a_template_whose_prompt_tokens_are_no_prefix_is_an_error():
    """The header ends in a space, which joins the answer's first letter in byte-level BPE."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'what' + m['content'] + ' ' }}{% else %}"
        "{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = chatml(template)
    assert tokenizer("x you").input_ids != tokenizer("x ").input_ids + tokenizer("you").input_ids
    with pytest.raises(TemplateError, match="not a prefix of the tokens"):
        encode_dialogue(tokenizer, ASK, "model", completion="you", **LONG)


def test_a_template_that_rewrites_earlier_turns_cannot_supervise_them():
    forgets = CHATML.replace(
        "message['content']", "(message['content'] if loop.last or message['role'] != 'assistant' else '...')"
    )
    tokenizer = chatml(forgets)
    dialogue = [*TWO_TURNS, {"role": "assistant", "content": "well"}]
    with pytest.raises(TemplateError, match="changes earlier turns"):
        encode_dialogue(tokenizer, dialogue, "model", **LONG)
    last = encode_dialogue(tokenizer, TWO_TURNS, "model", completion="well", **LONG)
    assert learned(tokenizer, last) == "well<|im_end|>"


def test_no_answer_to_learn_from_and_no_eos_are_errors():
    with pytest.raises(ValueError, match="ends with an assistant message"):
        encode_dialogue(chatml(), ASK, "model", **LONG)
    with pytest.raises(TemplateError, match="no EOS token"):
        encode_prompt(chatml(eos_token=None), ASK, "human_assistant", None)
