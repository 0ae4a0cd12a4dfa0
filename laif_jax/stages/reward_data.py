"""The pairs of a reward model: those it is trained on, those held out, and the test sets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from laif_jax.config import PairsSpec, RewardSpec
from laif_jax.data.chat import EncodedPair
from laif_jax.data.pairs import (
    Pair,
    Pairs,
    encode_pairs,
    from_preferences,
    load_pairs,
    split_by_prompt,
    training_pairs,
    without_prompts,
)
from laif_jax.data.pipeline import Batches, preference_batches
from laif_jax.evaluation.reward_accuracy import ScoredPairs
from laif_jax.models.reward import RewardModel
from laif_jax.records import DataError
from laif_jax.stages import fit, label
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import Context
from laif_jax.training.reward_task import bootstrap_weights
from laif_jax.training.tasks import shares_prompts

HELD_OUT = "held_out"


@dataclasses.dataclass(frozen=True)
class RewardData:
    """train: the pairs as the loss sees them. sets: what is measured on: the held-out pairs, if any, under `HELD_OUT`,
    then the test sets. counts: what was read and left out, plain JSON."""

    train: list[Pair]
    sets: dict[str, list[Pair]]
    counts: dict[str, Any]

    @property
    def held_out(self) -> list[Pair]:
        return self.sets.get(HELD_OUT, [])


def pairs_settings(pairs: Sequence[Artifact] | PairsSpec) -> dict[str, Any] | None:
    """What decides over the pairs, for a stage's key: files count by their content. Labels are inputs of their own."""
    if not isinstance(pairs, PairsSpec):
        return None
    return {
        "train": prompts_stage.source_settings(pairs.train, pairs.root),
        "tests": {
            name: prompts_stage.source_settings(source, pairs.root) for name, source in pairs.tests.items()
        },
    }


def read_pairs(pairs: Sequence[Artifact] | PairsSpec, spec: RewardSpec, seed: int) -> RewardData:
    """Reads, checks and splits the pairs.

    A training prompt that occurs in a test set is dropped with all its pairs. All pairs of a prompt are on one side of
    the split.

    Args:
      pairs: files, or stages of labels (several: the rounds whose labels are used again).

    Raises:
      DataError: a file is missing or malformed, or nothing is left to train on.
    """
    tests: Mapping[str, Pairs] = {}
    if isinstance(pairs, PairsSpec):
        if HELD_OUT in pairs.tests:
            raise DataError(
                f"pairs.tests: the name `{HELD_OUT}` is that of pairs held out of training; rename it"
            )
        tests = {name: load_pairs(source, pairs.root, seed) for name, source in pairs.tests.items()}
        given = load_pairs(pairs.train, pairs.root, seed)
    else:
        given = from_preferences(
            row for labels in pairs for row in (*label.read_preferences(labels), *label.read_ties(labels))
        )
    tested = {pair.prompt.id for rows in tests.values() for pair in rows}
    kept = without_prompts(given, tested)
    left, held_out = split_by_prompt(kept, spec.held_out, seed)
    train = training_pairs(left, spec)
    if not train:
        raise DataError(
            f"no pair is left to train on: {given.report.to_dict()}, {len(given) - len(kept)} of prompts that occur in "
            f"a test set, {len(held_out)} held out, {len(left) - len(train)} ties dropped"
        )
    counts = {
        "train": given.report.to_dict(),
        "dropped_because_in_test": len(given) - len(kept),
        "ties_dropped": len(left) - len(train),
        "used": len(train),
        HELD_OUT: len(held_out),
        "tests": {name: rows.report.to_dict() for name, rows in tests.items()},
    }
    sets: dict[str, list[Pair]] = {HELD_OUT: held_out} if held_out else {}
    return RewardData(train, sets | {name: list(rows) for name, rows in tests.items()}, counts)


class Encoder:
    """Pairs to batches for one reward model; a set is tokenised once."""

    def __init__(self, ctx: Context, model: RewardModel, spec: RewardSpec):
        self._ctx, self._spec = ctx, spec
        self._tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self._end = model.end_of_context
        self._shared = shares_prompts(spec, ctx.mesh, model.cfg)
        self._known: dict[int, tuple[list[Pair], list[EncodedPair]]] = {}

    def encode(self, pairs: list[Pair]) -> list[EncodedPair]:
        """The preferred side is `chosen`."""
        if id(pairs) not in self._known:  # the list is kept with it, so that its id stays its own
            encoded = encode_pairs(
                self._tokenizer,
                pairs,
                self._ctx.config.model.template,
                max_length=self._spec.max_length,
                max_prompt_length=self._spec.max_prompt_length,
                end_of_context=self._end,
            )
            self._known[id(pairs)] = (pairs, encoded)
        return self._known[id(pairs)][1]

    def training_batches(self, pairs: list[Pair]) -> Batches:
        """Batches of the whole run."""
        encoded, spec = self.encode(pairs), self._spec
        columns = {}
        if spec.margin > 0:
            columns["margin"] = np.array([pair.margin for pair in encoded], np.float32)
        if spec.bootstrap and spec.members > 1:
            columns["member_weight"] = bootstrap_weights(len(encoded), spec.members, self._ctx.seed)
        options = fit.batch_options(self._ctx, spec, self._tokenizer)
        return preference_batches(encoded, columns=columns, share_prompts=self._shared, **options)

    def test_batches(self, pairs: list[Pair]) -> Batches:
        """Every pair once, in shapes as of training."""
        once = self._spec.model_copy(update={"epochs": 1, "steps": None})
        options = fit.batch_options(self._ctx, once, self._tokenizer)
        return preference_batches(self.encode(pairs), shuffle=False, share_prompts=self._shared, **options)


def scored(pairs: Sequence[Pair], chosen: np.ndarray, rejected: np.ndarray) -> tuple[ScoredPairs, int]:
    """(the pairs with their scores, how many have none and are left out).

    Args:
      chosen, rejected: float32 [n] or [K, n], of `pair_scores`.
    """
    prefers_b = np.array([pair.chosen_is_b for pair in pairs], bool)
    a, b = np.where(prefers_b, rejected, chosen), np.where(prefers_b, chosen, rejected)
    whole = ScoredPairs(
        a=a.astype(np.float64),
        b=b.astype(np.float64),
        p_b=np.array([pair.p_b for pair in pairs], np.float64),
        length_a=np.array([len(pair.a) for pair in pairs], np.float64),
        length_b=np.array([len(pair.b) for pair in pairs], np.float64),
        prompts=[pair.prompt.id for pair in pairs],
        groups=[pair.groups for pair in pairs],
    )
    known = np.isfinite(whole.difference)
    return (whole if known.all() else whole.select(known)), int((~known).sum())
