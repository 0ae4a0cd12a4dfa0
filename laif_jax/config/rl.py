"""Schemas of reward models, reinforcement learning, and feedback that goes on."""

from typing import Any, Literal

from pydantic import Field, model_validator

from laif_jax.config.base import Fraction, Positive, Spec
from laif_jax.config.training import BestSpec, OptimizerSpec, PairTrainSpec, SamplingSpec, SftSpec

# ---- reward models ---------------------------------------------------------------------------------------------


class RewardSpec(PairTrainSpec):
    """A reward model: a scalar head on a decoder, trained on pairs.

    Attributes:
      loss: "bradley_terry" (with soft labels: RLAIF's cross-entropy) or "rao_kupper" (Bradley-Terry with ties).
      soft_labels: use `p_chosen` as it is; False: round it to 0, 1/2 or 1.
      ties: of "bradley_terry": "half": a tie is a label of 1/2; "drop": it is left out, and counted.
      tie_threshold: of "rao_kupper": log theta, the difference of scores below which a tie is likely.
      margin: the preferred score should win by this, times the pair's own `margin` where the data has one.
      label_smoothing: probability that a label is flipped.
      centering: weight of the squared sum of the two scores, which holds rewards near 0 (Eisenstein et al. 2023).
      members: reward models trained at once on the same batches, each from its own head, as an ensemble.
      bootstrap: members see the pairs under their own random weights (Bayesian bootstrap), so that they disagree where
        the data leave room.
      end_of_context: a token appended to every response, at which the score is read (HH-RLHF); one that the tokenizer
        does not have is added to it. None: the score is read at the response's last token.
      learning_rates: a sweep: one model per rate from one compiled step; the most accurate on held-out pairs is kept.
      held_out: share of the training prompts whose pairs are held out, to measure and to choose among
        `learning_rates` on; test sets stay for the report. 0: none.
      eval_every: optimiser steps between accuracies on held-out pairs; 0: after the last alone.
    """

    loss: Literal["bradley_terry", "rao_kupper"] = "bradley_terry"
    soft_labels: bool = True
    ties: Literal["half", "drop"] = "half"
    tie_threshold: float = Field(default=0.5, gt=0)
    margin: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    centering: float = Field(default=0.0, ge=0)
    members: Positive = 1
    bootstrap: bool = False
    end_of_context: str | None = None
    learning_rates: tuple[float, ...] = ()
    held_out: float = Field(default=0.1, ge=0.0, lt=1.0)
    eval_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_reward(self) -> "RewardSpec":
        if len(set(self.learning_rates)) != len(self.learning_rates) or any(
            rate <= 0 for rate in self.learning_rates
        ):
            raise ValueError("`learning_rates` must be different numbers above 0")
        if self.members > 1 and self.optimizer.name == "adafactor":
            raise ValueError(
                "`optimizer.name: adafactor` clips by statistics over a whole array, in which an ensemble's members "
                "lie together; with `members` above 1 use adamw, rmsprop or lion"
            )
        if self.learning_rates and "learning_rate" in self.optimizer.model_fields_set:
            raise ValueError("give one of `optimizer.learning_rate` and `learning_rates`, the sweep")
        if self.held_out == 0 and (self.learning_rates or self.eval_every):
            option = "learning_rates" if self.learning_rates else "eval_every"
            raise ValueError(f"`{option}` needs held-out pairs: set `held_out` above 0")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        unused = super().unused()
        if self.loss == "rao_kupper":
            unused["ties"] = ("`loss: rao_kupper`, which has ties of its own", "`loss: bradley_terry`")
        else:
            unused["tie_threshold"] = ("`loss: bradley_terry`", "`loss: rao_kupper`")
        if self.members == 1:
            unused["bootstrap"] = ("`members: 1`", "an ensemble, `members` above 1")
        return unused

    def resolved(self) -> dict[str, Any]:
        values = super().resolved()
        if self.learning_rates:  # the sweep's stand in place of the optimiser's one
            del values["optimizer"]["learning_rate"]
        return values


class RewardSource(Spec):
    """One term of the reward: `weight` times the score of a reward model, or of a critic that rates directly.

    Attributes:
      model: the folder of a reward model (`laif reward` wrote it). critic: the name of one of `critics`, whose critic
        data file gives ratings, such as `rating_1_10` (d-RLAIF). Give one of the two.
      members: what an ensemble's scores become: "mean", "min" (the most cautious) or "lower" (mean minus their
        standard deviation).
      normalize: scores are shifted and scaled by the mean and standard deviation that they had on training pairs.
      retokenize: score the decoded text with the reward model's own tokenizer, where it differs from the policy's.
      max_wait: seconds that one iteration waits for a critic's ratings; what has not come by then is left out of it.
    """

    model: str | None = None
    critic: str | None = None
    weight: float = 1.0
    members: Literal["mean", "min", "lower"] = "mean"
    normalize: bool = False
    retokenize: bool = False
    max_wait: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "RewardSource":
        if (self.model is None) == (self.critic is None):
            raise ValueError(
                "give one of `model` (a reward model's folder) and `critic` (a critic that rates)"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.critic is None:
            return {"max_wait": ("`model`", "`critic`")}
        return dict.fromkeys(("members", "normalize", "retokenize"), ("`critic`", "`model`"))


# ---- reinforcement learning ------------------------------------------------------------------------------------


class KlSpec(Spec):
    """The penalty for leaving the reference model.

    Attributes:
      estimator: per token, with d = log pi - log ref of the sampled token: "k1": d; "k2": d^2 / 2; "k3":
        exp(-d) - 1 + d; "full": the sum over the whole vocabulary.
      place: "reward": subtracted from each token's reward; "loss": added to the loss, with its gradient ("k1" has none
        on average, and is refused there).
      coef: the coefficient, or its first value where it adapts.
      target, horizon: of the adaptive controller (Ziegler et al. 2019, section 2.2): KL per response to hold, and
        episodes over which the error acts. None: the coefficient stays fixed.
    """

    estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    place: Literal["reward", "loss"] = "reward"
    coef: float = Field(default=0.05, ge=0)
    target: float | None = Field(default=None, gt=0)
    horizon: Positive = 10000

    @model_validator(mode="after")
    def _check_kl(self) -> "KlSpec":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "`place: loss` with `estimator: k1` holds nothing: the gradient of k1 is 0 on average. Use `k2` or "
                "`full` (the KL itself) or `k3` (as GRPO does), or `place: reward`"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        return {"horizon": ("a fixed coefficient", "a `target`")} if self.target is None else {}


class PpoSweep(Spec):
    """Further runs over every KL coefficient and learning rate, for the paper's Figures 9 and 10."""

    kl_coefs: tuple[float, ...]
    learning_rates: tuple[float, ...]


class PpoSpec(Spec):
    """Reinforcement learning on rewards (Ouyang et al. 2022; Stiennon et al. 2020).

    Attributes:
      algorithm: "ppo"; "reinforce": with a learned baseline (RLAIF's); "rloo": leave-one-out baseline over the samples
        of a prompt (Ahmadian et al. 2024); "grpo": group-normalised advantages (Shao et al. 2024).
      iterations: of rollout and update. batch_size: prompts per iteration, each sampled `sampling.samples` times.
      epochs: passes over an iteration's rollouts; minibatches: updates per pass; micro_batch: sequences per forward
        pass; None: the whole minibatch at once.
      value: "separate": a value model of its own, started as `value_init` says; "shared": a scalar head on the
        policy's trunk.
      value_init: "reward": from the reward model (the first, where there are several); "policy": from the policy.
      gamma, lam: of generalised advantage estimation (Schulman et al. 2016).
      whiten_advantages: to mean 0, variance 1 over the global batch of real tokens. whiten_rewards: variance 1, the
        mean stays. reward_clip: scores are cut to [-reward_clip, reward_clip] first.
      missing_eos_penalty: subtracted from the score of a response without an end; missing_eos_reward: replaces it.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; dual_clip: bound c > 1 on the loss of
        negative advantages (Ye et al. 2020). value_clip: range of the clipped value loss; None: not clipped.
      normalize: "token": losses are means over all tokens; "sequence": over a sequence's tokens, then over sequences.
      head_start: iterations at the start that train the value model alone.
      eval_every: iterations between evaluations on held-out prompts; 0: at the start and the end.
      eval_prompts: how many of them.
      keep: how many of the newest checkpoints stay. keep_best: and the best by a metric; None: none.
      keep_every: iterations between snapshots of the policy that stay, for a KL-reward curve; 0: none.
      sweep: further runs, for the figures of the paper's appendix.
    """

    algorithm: Literal["ppo", "reinforce", "rloo", "grpo"] = "ppo"
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=1e-6)
    iterations: Positive = 100
    batch_size: Positive = 64
    epochs: Positive = 4
    minibatches: Positive = 1
    micro_batch: Positive | None = None
    sampling: SamplingSpec = SamplingSpec()
    max_prompt_length: Positive = 256
    value: Literal["separate", "shared"] = "separate"
    value_init: Literal["reward", "policy"] = "reward"
    kl: KlSpec = KlSpec()
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    reward_clip: float | None = Field(default=None, gt=0)
    missing_eos_penalty: float | None = Field(default=None, ge=0)
    missing_eos_reward: float | None = None
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float | None = Field(default=None, gt=1)
    value_clip: float | None = Field(default=0.2, gt=0)
    value_coef: float = Field(default=0.1, ge=0)
    entropy_coef: float = 0.0
    normalize: Literal["token", "sequence"] = "token"
    head_start: int = Field(default=0, ge=0)
    log_every: Positive = 1
    save_every: int = Field(default=20, ge=0)
    keep: Positive = 2
    eval_every: int = Field(default=0, ge=0)
    eval_prompts: Positive = 64
    keep_every: int = Field(default=0, ge=0)
    keep_best: BestSpec | None = None
    sweep: PpoSweep | None = None

    @property
    def learns_values(self) -> bool:
        """Whether the algorithm trains a value function."""
        return self.algorithm in ("ppo", "reinforce")

    @model_validator(mode="after")
    def _check_ppo(self) -> "PpoSpec":
        rows = self.batch_size * self.sampling.samples
        if rows % self.minibatches:
            raise ValueError(
                f"`batch_size` x `sampling.samples` = {rows} sequences do not divide into {self.minibatches} "
                "`minibatches`"
            )
        if self.micro_batch and (rows // self.minibatches) % self.micro_batch:
            raise ValueError(
                f"a minibatch of {rows // self.minibatches} sequences is not a multiple of `micro_batch` "
                f"{self.micro_batch}"
            )
        if self.sampling.temperature == 0:
            raise ValueError("`sampling.temperature: 0` explores nothing; use a temperature above 0")
        if self.sampling.kv_cache != "compute":
            raise ValueError(
                "`sampling.kv_cache: int8` would draw responses from another distribution than the one whose log-probs "
                "the update uses. Remove it, or lower `sampling.batch_size` (rows decoded at a time) to save memory"
            )
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ValueError(
                "`sampling.top_p` and `sampling.top_k` cut the distribution that log-probs are computed under, so that "
                "ratios and KL would be of another policy; leave them off here"
            )
        if self.algorithm in ("rloo", "grpo") and self.sampling.samples < 2:
            raise ValueError(
                f"`algorithm: {self.algorithm}` compares samples: set `sampling.samples` to 2 or more"
            )
        if self.algorithm in ("reinforce", "rloo") and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"`algorithm: {self.algorithm}` is on-policy: set `epochs: 1` and `minibatches: 1` (one update "
                "per rollout)"
            )
        if self.missing_eos_penalty is not None and self.missing_eos_reward is not None:
            raise ValueError(
                "give one of `missing_eos_penalty` (subtracted) and `missing_eos_reward` (replaces)"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        choice = f"`algorithm: {self.algorithm}`"
        uses: dict[str, tuple[str, ...]] = {
            "value": ("ppo", "reinforce"),
            "value_init": ("ppo", "reinforce"),
            "value_coef": ("ppo", "reinforce"),
            "head_start": ("ppo", "reinforce"),
            "value_clip": ("ppo",),
            "gamma": ("ppo",),
            "lam": ("ppo",),
            "whiten_rewards": ("ppo",),
            "whiten_advantages": ("ppo", "reinforce", "rloo"),
            "clip_low": ("ppo", "grpo"),
            "clip_high": ("ppo", "grpo"),
            "dual_clip": ("ppo", "grpo"),
        }
        unused = {
            key: (choice, " and ".join(names)) for key, names in uses.items() if self.algorithm not in names
        }
        if self.value == "shared" and "value_init" not in unused:
            unused["value_init"] = ("`value: shared`", "`value: separate`")
        return unused


# ---- choosing among samples ------------------------------------------------------------------------------------


class BestOfNSpec(Spec):
    """Best-of-n: of `n` samples per prompt, the one that the reward model scores highest."""

    n: int = Field(default=16, ge=2)


class RejectionSpec(Spec):
    """Rejection-sampling fine-tuning: SFT of the policy on its own best of `n` samples per prompt.

    `top`: share of the prompts, by the score of their best sample, that are trained on.
    """

    n: int = Field(default=8, ge=2)
    top: float = Field(default=1.0, gt=0, le=1)
    train: SftSpec


# ---- feedback that goes on -------------------------------------------------------------------------------------


class IterateSpec(Spec):
    """Rounds of: sample from the current policy, ask for preferences, train, evaluate.

    All rounds together have the budget of one: each asks about prompts of its own, and `dpo.steps` or `ppo.iterations`
    are divided over the rounds (`dpo.epochs` are passes over a round's own labels). So an arm of several rounds and an
    arm of one, in one study, differ in when they ask, not in how much.

    Attributes:
      rounds: how many. prompts_per_round: None: the prompts that are left are divided evenly.
      reference: of DPO, and of PPO's KL: "initial": the SFT policy; "previous": the policy that the round started from.
      max_staleness: rounds: labels on samples of a policy that is more rounds old are not trained on; 0: only the
        round's own.
      max_comparisons, max_cost: over all rounds, in comparisons asked for and in US dollars (at the endpoint's prices):
        a round that would pass the bound is not begun, and the policy so far is the arm's.
      labels: "critic": the arm's critic, through the labelling service; "human": the round writes its comparisons to a
        file and ends with a message; put the labels beside it and run the same command again.
      evaluate: judge the policy of every round, not of the last alone.
    """

    rounds: Positive = 3
    prompts_per_round: Positive | None = None
    reference: Literal["initial", "previous"] = "previous"
    max_staleness: int = Field(default=0, ge=0)
    max_comparisons: Positive | None = None
    max_cost: float | None = Field(default=None, gt=0)
    labels: Literal["critic", "human"] = "critic"
    evaluate: bool = True

    def unused(self) -> dict[str, tuple[str, str]]:
        return {} if self.labels == "critic" else {"max_cost": ("`labels: human`", "`labels: critic`")}
