"""The synthetic world: instructions over short symbol strings, whose answers are known by program.

An instruction is `OPERATIONS:STRING`, for example `rev sort:dbac`: operations are applied from left to right, and the
answer is the resulting string alone (`abcd`). The text is short because the world's tokenizer has one token per
character.

Truths of this world:

* every instruction has exactly one right answer (`solve`), which is never empty;
* `quality` is 1 for the right answer and only for it, and falls with the edit distance to it, so partly right work is
  worth something and the better of two answers is always known;
* an answerer of skill s carries out each step correctly with probability s, independently; a failed step is a slip that
  really changes that step's result (`_slip`), so expected quality rises with s. A later step may still undo a slip (a
  wrong order, then `sort`), as in life;
* a slip is a fresh draw, or a habit: a model that is asked again errs again in the same way, and a student learns the
  habit, while it averages independent slips away and outgrows its teacher;
* an instruction belongs to one split for good, by its hash, whatever the seed: evaluation prompts never leak into
  pretraining or training.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator

from laif_jax.config.schema import SymbolsSpec
from laif_jax.records import Prompt
from laif_jax.records.errors import LaifError

CHARSET: str = " :abcdefghijklmnopqrstuvwxyz"
"""Every character that can occur in an instruction or an answer; the tokenizer is built from it."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"

OPERATIONS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "rev": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "uniq": lambda text: "".join(dict.fromkeys(text)),  # keeps the first of each symbol
    "twice": lambda text: text + text,
}

# `copy` changes nothing and a repeated operation cancels or has no effect, so neither occurs in a composition.
_COMPOSED = tuple(name for name in OPERATIONS if name != "copy")

# Splits as ranges of an instruction's hash modulo 10.
SPLITS: dict[str, range] = {"eval": range(2), "pretrain": range(2, 6), "train": range(6, 10)}


class SymbolsError(LaifError, ValueError):
    """An instruction that is not of this world, or a request for more prompts than it holds."""


def parse(instruction: str) -> tuple[tuple[str, ...], str]:
    """The operations, in order, and the string they act on.

    Raises:
      SymbolsError: not `OPERATIONS:STRING` with known operations and a non-empty string of letters a-z.
    """
    head, colon, text = instruction.strip().partition(":")
    names = tuple(head.split())
    if not colon or not names or not text or set(text) - set(_LETTERS):
        raise SymbolsError(
            f"not an instruction of the symbols world: {instruction!r}; expected e.g. 'rev sort:dbac'"
        )
    if unknown := [name for name in names if name not in OPERATIONS]:
        raise SymbolsError(
            f"unknown operation {unknown[0]!r} in {instruction!r}; known: {', '.join(OPERATIONS)}"
        )
    return names, text


def solve(instruction: str) -> str:
    """The right answer."""
    names, text = parse(instruction)
    for name in names:
        text = OPERATIONS[name](text)
    return text


def quality(instruction: str, text: str) -> float:
    """How good an answer is, in [0, 1]: 1 - edit distance to the right answer / length of the longer of the two.

    Surrounding white space does not count. 1.0 exactly for the right answer, and for nothing else.
    """
    truth, answer = solve(instruction), text.strip()
    return 1.0 - _edit_distance(truth, answer) / max(len(truth), len(answer))


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions cost 1."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


# ---- answerers of a chosen skill -------------------------------------------------------------------------------


def teacher_answer(instruction: str, skill: float, rng: random.Random, habits: str | None = None) -> str:
    """An answer by someone who carries out each step correctly with probability `skill`.

    Args:
      skill: in [0, 1]. 1: always the right answer. 0: every step slips.
      rng: the source of randomness; the same state gives the same answer.
      habits: None: each step succeeds or slips by a fresh draw. A name: errors are habits of that name. Whether an
        operation goes wrong on strings of a given length and first symbol, and how, is drawn once for ever; `rng`
        is not used.

    Returns:
      Non-empty, made of a-z alone.
    """
    if not 0.0 <= skill <= 1.0:
        raise ValueError(f"`skill` must be in [0, 1], found {skill}")
    names, text = parse(instruction)
    for name in names:
        if habits is not None:
            rng = random.Random(f"{habits}-{name}-{len(text)}-{text[0]}")
        text = OPERATIONS[name](text) if rng.random() < skill else _slip(OPERATIONS[name], text, rng)
    return text


def _slip(operation: Callable[[str], str], text: str, rng: random.Random) -> str:
    """The result of one step gone wrong: skipped, an element wrong, two neighbours swapped, an element or the end
    missing. Slips that would leave the right result or nothing at all are not slips."""
    right = operation(text)
    i = rng.randrange(len(right))
    others = sorted(set(text) - {right[i]}) or [_LETTERS[(_LETTERS.index(right[i]) + 1) % 26]]
    neighbours = right[:i] + right[i : i + 2][::-1] + right[i + 2 :]
    slips = [
        text,  # skipped
        right[:i] + rng.choice(others) + right[i + 1 :],  # an element wrong
        neighbours,
        right[:i] + right[i + 1 :],  # an element missed
        right[: (len(right) + 1) // 2],  # stopped half way
    ]
    return rng.choice([slip for slip in slips if slip and slip != right])


# ---- prompts ---------------------------------------------------------------------------------------------------


def make_prompts(spec: SymbolsSpec, n: int, seed: int, split: str = "train") -> list[Prompt]:
    """`n` distinct instructions of one split; the same arguments give the same list, and a smaller `n` its prefix
    (as long as the split is far from used up).

    The number of steps, then the operations, then the string's length are drawn uniformly, so short and long,
    easy and hard instructions are equally common.

    Args:
      split: "pretrain", "train" or "eval"; no instruction is in two of them.

    Raises:
      SymbolsError: the split holds fewer than `n` instructions, or the spec contradicts itself.
    """
    _check(spec)
    if split not in SPLITS:
        raise SymbolsError(f"unknown split {split!r} of the symbols world; known: {', '.join(SPLITS)}")
    rng = random.Random(f"symbols-{split}-{seed}")
    share = len(SPLITS[split]) / 10
    # Drawing and rejecting is quick while most of the split is unused; near the end it is counted out instead.
    if n <= 0.5 * share * count(spec):
        made: dict[str, None] = {}
        while len(made) < n:
            instruction = _draw(spec, rng)
            if _split_of(instruction) == split:
                made[instruction] = None
        chosen = list(made)
    else:
        everything = [text for text in _enumerate(spec) if _split_of(text) == split]
        if n > len(everything):
            raise SymbolsError(
                f"the symbols world has {len(everything)} distinct instructions in its {split!r} split with "
                f"symbols={spec.symbols}, min_length={spec.min_length}, max_length={spec.max_length}, "
                f"max_steps={spec.max_steps}; {n} were asked for. Ask for fewer, or enlarge the world."
            )
        chosen = rng.sample(everything, n)
    return [Prompt.from_text(text, source="symbols", split=split) for text in chosen]


def count(spec: SymbolsSpec) -> int:
    """How many distinct instructions the world holds, over all splits."""
    strings = sum(spec.symbols**length for length in range(spec.min_length, spec.max_length + 1))
    return strings * sum(len(_programs(steps)) for steps in range(1, spec.max_steps + 1))


def _check(spec: SymbolsSpec) -> None:
    if spec.min_length > spec.max_length:
        raise SymbolsError(f"`min_length` {spec.min_length} is above `max_length` {spec.max_length}")
    if spec.max_steps > len(_COMPOSED):
        raise SymbolsError(
            f"`max_steps` {spec.max_steps}: an instruction composes at most {len(_COMPOSED)} different operations"
        )


def _programs(steps: int) -> list[tuple[str, ...]]:
    """All sequences of `steps` operations."""
    if steps == 1:
        return [(name,) for name in OPERATIONS]
    return list(itertools.permutations(_COMPOSED, steps))


def _write(names: tuple[str, ...], text: str) -> str:
    return f"{' '.join(names)}:{text}"


def _draw(spec: SymbolsSpec, rng: random.Random) -> str:
    names = rng.choice(_programs(rng.randint(1, spec.max_steps)))
    length = rng.randint(spec.min_length, spec.max_length)
    return _write(names, "".join(rng.choices(_LETTERS[: spec.symbols], k=length)))


def _enumerate(spec: SymbolsSpec) -> Iterator[str]:
    for steps in range(1, spec.max_steps + 1):
        for names in _programs(steps):
            for length in range(spec.min_length, spec.max_length + 1):
                for letters in itertools.product(_LETTERS[: spec.symbols], repeat=length):
                    yield _write(names, "".join(letters))


def _split_of(instruction: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(instruction.encode()).digest()[:8], "big") % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)
