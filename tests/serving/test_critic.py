"""A served checkpoint as a critic: the first token's log-probs, read by the labelling service's own parser."""

import math

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from laif_jax.labeling.answers import read_answer
from laif_jax.labeling.parsers import make_parser
from tests.serving.conftest import ask, body, make_model, serving

WORDS = ("<pad>", "<eos>", "<unk>", "A", "B", "which", "is", "better", "?", "one", "two")


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}",
    )


async def test_the_first_tokens_log_probs_hold_both_options_and_the_parser_reads_them():
    """One greedy token with 20 alternatives, as the `ab_logprob` critic asks for."""
    question = "which is better ? one two"
    request = body(question, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20)
    async with serving("critic", model=make_model(word_tokenizer())) as (_, client):
        answer = await ask(client, request)
    first = answer["choices"][0]["logprobs"]["content"][0]
    top = {best["token"]: best["logprob"] for best in first["top_logprobs"]}
    assert {"A", "B"} <= set(top)
    assert len(top) == len(WORDS)  # the vocabulary is smaller than 20
    assert abs(sum(map(math.exp, top.values())) - 1) < 1e-5
    assert top[first["token"]] == first["logprob"]
    verdict = make_parser("ab_logprob", {"tokens": ["A", "B"]}).parse(
        read_answer(answer, needs_logprobs=True)
    )
    a, b = math.exp(top["A"]), math.exp(top["B"])
    assert abs(verdict.p_second - b / (a + b)) < 1e-6
