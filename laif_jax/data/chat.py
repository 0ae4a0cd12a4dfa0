"""Conversations to tokens and a loss mask: the one place where masks, ends of turns and truncation are decided.

Two templates (`templates.py`):

* "model": the tokenizer's own chat template. The tokens of a prompt are a prefix of the tokens of its dialogue
  (`TemplateError` otherwise): what is trained on is what generation will see.
* "human_assistant": the plain template of Sharma et al. 2024, `Human: ...`, blank line, `Assistant: ` (trailing
  space), without BOS.

Supervised are an answer's tokens and the token that ends its turn. That token is written only when the answer ended by
itself: an answer that was cut, by its generator or here, has none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from laif_jax.data.templates import Format, Parts, TemplateName, Turn, get_format
from laif_jax.records import Message
from laif_jax.records.errors import LaifError

Messages = Sequence[Message | Mapping[str, str]]


class PromptTooLongError(LaifError, ValueError):
    """A prompt does not fit, and may not or cannot be cut."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised dialogue.

    Attributes:
      tokens: token ids, without padding.
      loss_mask: 1 where the token is a supervised target, else 0; as long as `tokens`; 0 at the first token.
      prompt_length: tokens before the last answer.
      prompt_truncated, response_truncated: tokens were cut off the prompt's start, off the last answer's end.
      ended: the last token ends the turn.
      special_text: a message holds the text of a special token (such as `</s>`) that the tokenizer reads as one.
    """

    tokens: list[int]
    loss_mask: list[int]
    prompt_length: int
    prompt_truncated: bool = False
    response_truncated: bool = False
    ended: bool = True
    special_text: bool = False

    @property
    def truncated(self) -> bool:
        """Whether anything was cut."""
        return self.prompt_truncated or self.response_truncated

    @property
    def supervised(self) -> int:
        """How many tokens are supervised targets."""
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Two answers to one prompt, which is the same tokens in both. p_chosen: probability that `chosen` is the better
    one. weight: of the pair in the loss. margin: how much better, for reward models."""

    chosen: Encoded
    rejected: Encoded
    p_chosen: float = 1.0
    weight: float = 1.0
    margin: float = 1.0


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts for generation: their tokens, and which of them lost their start."""

    tokens: list[list[int]] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)

    @property
    def truncated_count(self) -> int:
        return sum(self.truncated)


class _Limits(NamedTuple):
    max_length: int
    max_prompt_length: int
    paper: bool


# ---- public functions ------------------------------------------------------------------------------------------


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: TemplateName,
    *,
    max_length: int,
    max_prompt_length: int,
    completion: str | None = None,
    finish_reason: str = "stop",
    paper_truncation: bool = False,
) -> Encoded:
    """Tokens and loss mask of a dialogue.

    With `completion`, `messages` is the prompt, and the completion alone is supervised: earlier assistant turns are
    context. Without, `messages` ends with an assistant turn, and every assistant turn is supervised.

    Truncation, only when the whole exceeds `max_length`: first the prompt is cut to its last `max_prompt_length`
    tokens (a leading BOS stays); then, if it is still too long, the last answer loses its end, and its end of turn.

    Args:
      finish_reason: of the last answer; anything but "stop" means that it did not end by itself: no end of turn.
      paper_truncation: an answer that must be cut is cut to `max_length - max_prompt_length` tokens, even after a
        short prompt, as in the paper's code.

    Raises:
      TemplateError: the template breaks; the message says how.
      PromptTooLongError: `max_prompt_length` does not even hold what the template itself writes.
      ValueError: there is no answer to learn from, or the limits leave no room for one.
    """
    turns = _plain(messages)
    if completion is None:
        if not turns or turns[-1]["role"] != "assistant":
            raise ValueError(
                "a dialogue to learn from ends with an assistant message; give `completion`, or add the answer"
            )
        turns, answer = turns[:-1], turns[-1]["content"]
    else:
        answer = completion
    limits = _limits(max_length, max_prompt_length, paper_truncation)
    format_ = get_format(tokenizer, template)
    ends = finish_reason == "stop"
    parts = format_.dialogue(turns, answer, ends=ends, supervise_context=completion is None)
    special = format_.holds_special([*turns, {"role": "assistant", "content": answer}])
    return _assemble(format_, parts, limits, len(parts.response), ends, special)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    chosen: str,
    rejected: str,
    template: TemplateName,
    *,
    max_length: int,
    max_prompt_length: int,
    p_chosen: float = 1.0,
    finish_reasons: tuple[str, str] = ("stop", "stop"),
    paper_truncation: bool = False,
) -> EncodedPair:
    """Tokens and loss masks of two answers to one prompt; the answers alone are supervised.

    The prompt is cut when prompt and *longer* answer exceed `max_length`, and then for both: chosen and rejected never
    differ in what they answer. Each answer is then cut if it does not fit itself (with `paper_truncation`: both are,
    when the longer one does not fit).

    Args:
      finish_reasons: of chosen and rejected.

    Raises: as `encode_dialogue`.
    """
    turns = _plain(messages)
    limits = _limits(max_length, max_prompt_length, paper_truncation)
    format_ = get_format(tokenizer, template)
    texts = (chosen, rejected)
    ends = [reason == "stop" for reason in finish_reasons]
    parts = [
        format_.dialogue(turns, text, ends=end, supervise_context=False) for text, end in zip(texts, ends)
    ]
    longest = max(len(part.response) for part in parts)
    sides = [
        _assemble(
            format_,
            part,
            limits,
            longest,
            end,
            format_.holds_special([*turns, {"role": "assistant", "content": text}]),
        )
        for part, text, end in zip(parts, texts, ends)
    ]
    return EncodedPair(sides[0], sides[1], p_chosen)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: TemplateName,
    max_prompt_length: int | None,
    *,
    truncate: bool = True,
) -> list[int]:
    """Tokens of a prompt for generation, up to where the assistant's turn begins; at most its last
    `max_prompt_length` tokens (a leading BOS stays).

    Raises:
      PromptTooLongError: it is longer and `truncate` is False, or the limit does not hold what the template writes.
      TemplateError: the template breaks.
    """
    format_ = get_format(tokenizer, template)
    tokens = format_.prompt(_plain(messages))
    if max_prompt_length is None or len(tokens) <= max_prompt_length:
        return tokens
    if not truncate:
        raise PromptTooLongError(
            f"a prompt has {len(tokens)} tokens, {len(tokens) - max_prompt_length} more than the {max_prompt_length} "
            "that fit beside the answer. Shorten it, raise the limit, or allow truncation."
        )
    return _keep_end(format_, tokens, max_prompt_length)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Messages],
    template: TemplateName,
    max_prompt_length: int | None,
) -> EncodedPrompts:
    """`encode_prompt` of each, with the record of which were cut."""
    result = EncodedPrompts()
    format_ = get_format(tokenizer, template)
    for messages in prompts:
        tokens = format_.prompt(_plain(messages))
        too_long = max_prompt_length is not None and len(tokens) > max_prompt_length
        result.tokens.append(_keep_end(format_, tokens, max_prompt_length) if too_long else tokens)
        result.truncated.append(too_long)
    return result


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: TemplateName) -> tuple[int, ...]:
    """The tokens at which generation stops: the template's end of turn, and EOS."""
    ids = [get_format(tokenizer, template).end_id, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(id_) for id_ in ids if id_ is not None))


# ---- inside ----------------------------------------------------------------------------------------------------


def _plain(messages: Messages) -> list[Turn]:
    return [{"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in messages]


def _limits(max_length: int, max_prompt_length: int, paper: bool) -> _Limits:
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            f"`max_prompt_length` {max_prompt_length} must be positive and leave room in `max_length` {max_length}"
        )
    return _Limits(max_length, max_prompt_length, paper)


def _keep_end(format_: Format, tokens: list[int], length: int | None) -> list[int]:
    """The last `length` tokens; a leading BOS is kept in place of the first of them."""
    if length is None or len(tokens) <= length:
        return tokens
    bos = int(tokens[0] == format_.bos_id)
    if length < bos + format_.header + 1:
        raise PromptTooLongError(
            f"a prompt limit of {length} tokens leaves no room for the prompt: the template itself writes "
            f"{bos + format_.header}. Raise `max_prompt_length`."
        )
    return tokens[:bos] + tokens[len(tokens) - length + bos :]


def _assemble(
    format_: Format, parts: Parts, limits: _Limits, longest: int, ends: bool, special: bool
) -> Encoded:
    """Truncates and joins. `longest`: tokens of the longest answer to this prompt, which decides over its cut."""
    prompt, mask, response = parts.prompt, parts.prompt_mask, parts.response
    over = len(prompt) + longest > limits.max_length
    if prompt_cut := over and len(prompt) > limits.max_prompt_length:
        prompt = _keep_end(format_, prompt, limits.max_prompt_length)
        mask = mask[
            len(mask) - len(prompt) :
        ]  # a kept BOS takes the place of an unsupervised token or loses below
    room = limits.max_length - len(prompt)
    if limits.paper:
        response_over, room = longest > room, limits.max_length - limits.max_prompt_length
    else:
        response_over = len(response) > room
    response_cut = response_over and len(response) > room
    response = response[:room] if response_cut else response
    loss_mask = [*mask, *[1] * len(response)]
    if loss_mask:
        loss_mask[0] = 0  # nothing precedes it, so nothing predicts it
    return Encoded(
        tokens=[*prompt, *response],
        loss_mask=loss_mask,
        prompt_length=len(prompt),
        prompt_truncated=prompt_cut,
        response_truncated=response_cut,
        ended=ends and not response_cut,
        special_text=special,
    )
