"""Templates: how a conversation becomes text and tokens, and which of them belong to which turn.

A `Format` cuts a conversation into pieces, each supervised or not; `chat.py` masks and truncates what comes out.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jinja2
from transformers import PreTrainedTokenizerBase

from laif_jax.records.errors import LaifError

TemplateName = Literal["model", "human_assistant"]
Turn = dict[str, str]

_PROBE = "\ue000laif\ue000"  # private-use text that no template changes; stands for an answer
# Llama 3's templates write today's date unless told one, which would make tokens depend on the day.
_FIXED: dict[str, Any] = {"date_string": "26 Jul 2024"}


class TemplateError(LaifError, ValueError):
    """The tokenizer has no chat template, or one that cannot be turned into tokens and a loss mask."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A dialogue in tokens: everything before the last answer with its loss mask, and the last answer."""

    prompt: list[int]
    prompt_mask: list[int]
    response: list[int]


class Format(Protocol):
    """A template bound to a tokenizer.

    Attributes:
      end_id: the token that ends an assistant turn. bos_id: what the template writes before everything else, or None.
      header: tokens that the template writes between the last message and the answer.
    """

    end_id: int
    bos_id: int | None
    header: int

    def prompt(self, context: Sequence[Turn]) -> list[int]:
        """Tokens up to where the assistant's next turn begins."""
        ...

    def dialogue(self, context: Sequence[Turn], answer: str, *, ends: bool, supervise_context: bool) -> Parts:
        """Tokens of `context` and of `answer`, the latter with its end of turn if `ends`."""
        ...

    def holds_special(self, turns: Sequence[Turn]) -> bool:
        """Whether a message's own text would be read as a special token."""
        ...


def get_format(tokenizer: PreTrainedTokenizerBase, template: TemplateName) -> Format:
    """The format, made once per tokenizer and template.

    Raises:
      TemplateError: the tokenizer has no usable chat template, or no EOS token.
    """
    return _make(tokenizer, template, str(getattr(tokenizer, "chat_template", None)))


@functools.lru_cache(maxsize=16)
def _make(tokenizer: PreTrainedTokenizerBase, template: TemplateName, _chat_template: str) -> Format:
    if template == "human_assistant":
        return HumanAssistant(tokenizer)
    if template == "model":
        return ModelTemplate(tokenizer)
    raise TemplateError(f"unknown template {template!r}; known: model, human_assistant")


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise TemplateError(
            "the tokenizer has no EOS token, so no answer can be ended; set `eos_token` in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


# ---- the paper's plain template --------------------------------------------------------------------------------


class HumanAssistant:
    """`Human: {instruction}`, a blank line, `Assistant: `. See Sharma et al. 2024 and `docs/reference/data.md`.

    Pieces are tokenised apart, without BOS; EOS ends every assistant turn. The text of a special token in a message
    stays text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.end_id = _eos(tokenizer)
        self.bos_id = None  # the template writes none
        self.header = len(self._ids("Assistant: "))

    def prompt(self, context: Sequence[Turn]) -> list[int]:
        return self._context(context)[0]

    def dialogue(self, context: Sequence[Turn], answer: str, *, ends: bool, supervise_context: bool) -> Parts:
        tokens, mask = self._context(context)
        response = self._ids(answer) + [self.end_id] * ends
        return Parts(tokens, mask if supervise_context else [0] * len(mask), response)

    def holds_special(self, turns: Sequence[Turn]) -> bool:
        return False

    def _context(self, context: Sequence[Turn]) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        mask: list[int] = []

        def add(ids: list[int], supervised: int) -> None:
            tokens.extend(ids)
            mask.extend([supervised] * len(ids))

        text = ""  # written by the template since the last answer
        for turn in context:
            if turn["role"] == "assistant":
                add(self._ids(text + "Assistant: "), 0)
                add([*self._ids(turn["content"]), self.end_id], 1)
                text = "\n\n"
            else:
                text += ("Human: " if turn["role"] == "user" else "") + turn["content"] + "\n\n"
        add(self._ids(text + "Assistant: "), 0)
        return tokens, mask

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


# ---- the model's own template ----------------------------------------------------------------------------------


class ModelTemplate:
    """The tokenizer's chat template, rendered and tokenised as `apply_chat_template` does (so BOS is there exactly
    if the template writes it, and once).

    What the template writes after an answer up to and with its first special token ends the turn; what follows
    (ChatML's newline) is cut after the last answer, where generation stops too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                "the tokenizer has no chat template; use `model.template: human_assistant`, or a tokenizer that has one"
            )
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self._ids = functools.lru_cache(maxsize=64)(
            lambda text: tuple(self._tokenise(text))
        )  # a pair's sides share a prompt
        self._read_template()

    def _read_template(self) -> None:
        """Finds how the template closes an answer, and checks that prompts are prefixes of dialogues."""
        context = [{"role": "user", "content": "x"}]
        prompt, bare = self._render(context), self._render(context, generate=False)
        whole = self._render([*context, {"role": "assistant", "content": _PROBE}], generate=False)
        if not whole.startswith(prompt) or _PROBE not in whole:
            raise TemplateError(
                "the tokenizer's chat template breaks the rule that a prompt with its generation header begins the "
                f"whole dialogue: prompt {prompt!r}, dialogue {whole!r}. Use `model.template: human_assistant`, or "
                "mend the template."
            )
        self._closing = whole.rpartition(_PROBE)[2]
        end = self._special.search(self._closing) if self._special else None
        self._end_text = self._closing[: end.end()] if end else ""
        # A template that never closes an answer with a special token: EOS itself is appended.
        self._append = [] if end else [_eos(self._tokenizer)]
        self.end_id = self._tokenise(end.group())[-1] if end else self._append[0]
        self.header = len(self._tokenise(prompt[len(bare) :] if prompt.startswith(bare) else ""))
        # SmolLM2 names <|im_start|>, which opens every turn, as its BOS: that is no mark of the beginning.
        bos = self._tokenizer.bos_token_id
        self.bos_id = bos if self._tokenise(prompt).count(bos) == 1 else None
        for answer in ("x", "Yes", "I", "The", "you"):
            text = self._answered(context, answer, self._end_text)
            if self._tokenise(text)[: len(self._tokenise(prompt))] != self._tokenise(prompt):
                raise TemplateError(
                    "with this tokenizer's chat template the tokens of a prompt are not a prefix of the tokens of the "
                    f"whole dialogue ({text!r}), so training and generation would see different prompts. Use "
                    "`model.template: human_assistant`, or mend the template."
                )

    def prompt(self, context: Sequence[Turn]) -> list[int]:
        return list(self._ids(self._render(context)))

    def dialogue(self, context: Sequence[Turn], answer: str, *, ends: bool, supervise_context: bool) -> Parts:
        cuts, text = self._cuts(context, answer, ends, supervise_context)
        pieces = self._split_tokens(text, cuts)
        tokens = [token for piece in pieces[:-1] for token in piece]
        # Pieces alternate: template and questions, an answer, template and questions, an answer, ...
        mask = [i % 2 for i, piece in enumerate(pieces[:-1]) for _ in piece]
        return Parts(tokens, mask, pieces[-1] + (self._append if ends else []))

    def holds_special(self, turns: Sequence[Turn]) -> bool:
        return self._special is not None and any(self._special.search(turn["content"]) for turn in turns)

    def _cuts(
        self, context: Sequence[Turn], answer: str, ends: bool, supervise_context: bool
    ) -> tuple[list[int], str]:
        """The dialogue's text, and the places in it where supervised answers begin and end (all but the last)."""
        texts: list[str] = []
        if supervise_context:
            for i in [i for i, turn in enumerate(context) if turn["role"] == "assistant"]:
                texts += [
                    self._render(context[:i]),
                    self._answered(context[:i], context[i]["content"], self._end_text),
                ]
        texts += [self._render(context), self._answered(context, answer, self._end_text if ends else "")]
        for shorter, longer in itertools.pairwise(texts):
            if not longer.startswith(shorter):
                raise TemplateError(
                    "the chat template changes earlier turns when later ones follow, so they cannot be supervised: "
                    f"{shorter!r} does not begin {longer!r}. Train on the last answer alone, or use "
                    "`model.template: human_assistant`."
                )
        return [len(text) for text in texts[:-1]], texts[-1]

    def _answered(self, context: Sequence[Turn], answer: str, end: str) -> str:
        """The text of `context` and an answer; `end` instead of the template's own closing text."""
        text = self._render([*context, {"role": "assistant", "content": answer}], generate=False)
        if not text.endswith(self._closing):
            raise TemplateError(
                f"the chat template closes this answer otherwise than with {self._closing!r}: {text[-80:]!r}"
            )
        return text[: len(text) - len(self._closing)] + end

    def _split_tokens(self, text: str, cuts: list[int]) -> list[list[int]]:
        """Tokens of `text`, split at the characters `cuts`.

        The text is tokenised whole, and what precedes each cut must give a prefix of that. Where an answer's first
        characters would merge into the prompt's last token (an answer that begins with a newline, say), the pieces
        are tokenised apart instead: the prompt's tokens must be those that generation sees.
        """
        whole = self._tokenise(text)
        heads = [self._ids(text[:cut]) for cut in cuts]
        bounds = [0, *map(len, heads), len(whole)]
        if all(tuple(whole[: len(head)]) == head for head in heads):
            return [whole[a:b] for a, b in itertools.pairwise(bounds)]
        places = [0, *cuts, len(text)]
        return [list(self._ids(text[a:b])) for a, b in itertools.pairwise(places)]

    def _tokenise(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, turns: Sequence[Turn], generate: bool = True) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=generate, **_FIXED
            )
            return str(text)
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise TemplateError(
                f"the tokenizer's chat template refuses a conversation with roles [{roles}]: {error}"
            ) from error
