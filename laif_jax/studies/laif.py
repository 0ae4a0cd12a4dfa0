"""The LAIF matrix as a graph of stages (Sharma et al. 2024): arms share every prefix that they can.

For each replicate: prompts -> base model -> teacher completions -> SFT on a share -> [samples -> critic -> learning
from its labels] -> samples on the evaluation prompts -> judge. What two arms have in common is one node: the SFT, its
samples and their labels, and the reward model that is trained on them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

from laif_jax.config import ArmSpec, PpoSpec, RewardSource, SamplingSpec, StudyConfig, expand_arms
from laif_jax.stages import (
    agreement,
    base,
    best_of_n,
    dpo,
    evaluate,
    label,
    ppo,
    prompts,
    rejection,
    reward,
    sample,
    sft,
    teach,
)
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import StudyContext
from laif_jax.stages.split import sft_count
from laif_jax.studies.graph import Node
from laif_jax.studies.rounds import Round, make_rounds

Run = Callable[[Mapping[str, Artifact]], Artifact]
Setting = tuple[float, float]  # (KL coefficient, learning rate)


@dataclasses.dataclass(frozen=True)
class Replicate:
    """The nodes of one seed.

    Attributes:
      arms: each arm's evaluation. training: the training nodes behind it, in order.
      labels: of each arm that learns from preferences; of an arm of rounds, by "ARM, round 1" and so on.
      rewards: reward models, named likewise.
      rounds: of each iterated arm. starts: the evaluation of what its first round starts from.
      runs: per `ppo` arm the PPO runs by (KL coefficient, learning rate): its own, then the sweep's.
      chosen: per arm that takes its best samples, the stage which chose them.
    """

    seed: int
    arms: Mapping[str, Node]
    training: Mapping[str, tuple[Node, ...]]
    labels: Mapping[str, Node]
    agreement: Node | None
    rewards: Mapping[str, Node] = dataclasses.field(default_factory=dict)
    rounds: Mapping[str, tuple[Round, ...]] = dataclasses.field(default_factory=dict)
    starts: Mapping[str, Node] = dataclasses.field(default_factory=dict)
    runs: Mapping[str, Mapping[Setting, Node]] = dataclasses.field(default_factory=dict)
    chosen: Mapping[str, Node] = dataclasses.field(default_factory=dict)

    def targets(self) -> list[Node]:
        """What a study runs: the arms, then what is only measured."""
        rounds = [r.evaluation for made in self.rounds.values() for r in made if r.evaluation]
        runs = [node for settings in self.runs.values() for node in settings.values()]
        return [*self.arms.values(), *self.starts.values(), *rounds, *runs]


def build(ctx: StudyContext) -> Replicate:
    """The graph of one replicate. Nothing is run."""
    return Builder(ctx).replicate()


class Builder:
    """Makes nodes; each `functools.cache`d method returns the same node for the same arguments, which is what makes
    prefixes shared."""

    def __init__(self, ctx: StudyContext):
        self.ctx = ctx
        self.config: StudyConfig = ctx.config
        self.arms = expand_arms(ctx.config)

    def replicate(self) -> Replicate:
        rounds = {arm.name: self._rounds(arm) for arm in self.arms if arm.optimize.startswith("iterated")}
        labels = {arm.name: self._labels(arm) for arm in self.arms if _has_labels(arm)}
        rewards = {arm.name: self._reward(arm) for arm in self.arms if _has_reward(arm)}
        for name, made in rounds.items():
            labels |= {f"{name}, round {r.number}": r.labels for r in made}
            rewards |= {f"{name}, round {r.number}": r.reward for r in made if r.reward}
        choosing = ("best_of_n", "rejection_sampling")
        judged = self.config.evaluation.agreement
        return Replicate(
            seed=self.ctx.seed,
            arms={arm.name: self._arm_evaluation(arm) for arm in self.arms},
            training={arm.name: self._chain(arm) for arm in self.arms},
            labels=labels,
            agreement=self.node("judge agreement", lambda _: agreement.run(self.ctx)) if judged else None,
            rewards=rewards,
            rounds=rounds,
            starts={arm.name: self._start(arm) for arm in self.arms if arm.name in rounds},
            runs={arm.name: self._ppo_runs(arm) for arm in self.arms if arm.optimize == "ppo"},
            chosen={arm.name: self._best(arm) for arm in self.arms if arm.optimize in choosing},
        )

    # ---- shared nodes ------------------------------------------------------------------------------------------

    def node(self, name: str, run: Run, *, arm: str = "", **inputs: Node) -> Node:
        """A node of this replicate."""
        return Node(name=name, run=run, inputs=inputs, arm=arm, seed=self.ctx.seed)

    @functools.cached_property
    def prompts(self) -> Node:
        return self.node("prompts", lambda _: prompts.run(self.ctx))

    @functools.cached_property
    def base(self) -> Node:
        return self.node("base model", lambda _: base.run(self.ctx))

    @functools.cached_property
    def references(self) -> Node:
        name = self.config.evaluation.reference
        return self.node(
            f"reference completions of {name}",
            lambda i: teach.run(self.ctx, i["prompts"], teacher=name, split="eval"),
            prompts=self.prompts,
        )

    @functools.cache  # noqa: B019 - the builder lives as long as one call of `build`
    def teacher(self, name: str) -> Node:
        """Completions of as many training prompts as any arm needs of this teacher."""
        arms = [arm for arm in self.arms if arm.teacher == name]
        share = (
            1.0 if any(arm.pairs == "policy_vs_teacher" for arm in arms) else max(arm.share for arm in arms)
        )

        def run(inputs: Mapping[str, Artifact]) -> Artifact:
            total = inputs["prompts"].metrics["train"]
            return teach.run(
                self.ctx, inputs["prompts"], teacher=name, split="train", stop=sft_count(total, share)
            )

        return self.node(f"teacher {name}", run, prompts=self.prompts)

    @functools.cache  # noqa: B019
    def sft(self, teacher: str, share: float) -> Node:
        return self.node(
            f"sft {teacher} {share:.0%}",
            lambda i: sft.run(self.ctx, i["base"], i["prompts"], i["teacher"], share=share),
            base=self.base,
            prompts=self.prompts,
            teacher=self.teacher(teacher),
        )

    @functools.cache  # noqa: B019
    def _policy_samples(self, teacher: str, share: float, count: int) -> Node:
        """Samples of the SFT policy on the prompts that its SFT did not use."""
        spec = self.config.sampling.model_copy(update={"samples": count})

        def run(inputs: Mapping[str, Artifact]) -> Artifact:
            start = sft_count(inputs["prompts"].metrics["train"], share)
            return self.sample(inputs, f"sft {teacher} {share:.0%}", "train", spec, start)

        name = f"samples of sft {teacher} {share:.0%}" + ("" if count <= 2 else f", {count} each")
        return self.node(name, run, prompts=self.prompts, model=self.sft(teacher, share))

    def sample(
        self,
        inputs: Mapping[str, Artifact],
        generator: str,
        split: str,
        spec: SamplingSpec,
        start: int = 0,
        stop: int | None = None,
    ) -> Artifact:
        """Samples of `inputs["model"]`."""
        return sample.run(
            self.ctx,
            inputs["prompts"],
            inputs["model"],
            generator=generator,
            split=split,
            spec=spec,
            max_prompt_length=self.config.sft.max_prompt_length,
            start=start,
            stop=stop,
        )

    # ---- what a critic's labels are made into ------------------------------------------------------------------

    def _labels(self, arm: ArmSpec) -> Node:
        return self._labels_of(arm.teacher, arm.share, arm.pairs, arm.critic or "")

    @functools.cache  # noqa: B019
    def _labels_of(self, teacher: str, share: float, pairs: str, critic: str) -> Node:
        against_teacher = pairs == "policy_vs_teacher"
        samples = self._policy_samples(teacher, share, 1 if against_teacher else 2)
        inputs = {"prompts": self.prompts, "samples": samples}
        return Node(
            name=f"labels by {critic}, {pairs.replace('_', ' ')}, sft {teacher} {share:.0%}",
            run=lambda i: label.run(self.ctx, i["prompts"], i["samples"], i.get("teacher"), critic=critic),
            inputs=inputs | ({"teacher": self.teacher(teacher)} if against_teacher else {}),
            seed=self.ctx.seed,
        )

    def _reward(self, arm: ArmSpec) -> Node:
        return self._reward_of(arm.teacher, arm.share, arm.pairs, arm.critic or "")

    @functools.cache  # noqa: B019
    def _reward_of(self, teacher: str, share: float, pairs: str, critic: str) -> Node:
        """The reward model on the labels of the SFT policy's samples, started from that policy."""
        spec = self.config.reward
        assert spec is not None  # checked when the configuration was read
        labels = self._labels_of(teacher, share, pairs, critic)
        return self.node(
            f"reward model on {labels.name}",
            lambda i: reward.run(self.ctx, i["model"], [i["labels"]], spec),
            model=self.sft(teacher, share),
            labels=labels,
        )

    @functools.cache  # noqa: B019
    def _ppo(self, arm: ArmSpec, spec: PpoSpec) -> Node:
        """One PPO run from the SFT policy, on the prompts that its SFT did not use."""
        rewards = {} if arm.reward == "critic" else {"reward": self._reward(arm)}
        return self.ppo(
            f"ppo {arm.name}" + _point(spec, self.config.ppo),
            arm,
            spec,
            self.sft(arm.teacher, arm.share),
            rewards,
        )

    def ppo(
        self,
        name: str,
        arm: ArmSpec,
        spec: PpoSpec,
        policy: Node,
        inputs: Mapping[str, Node],
        *,
        seed: int | None = None,
    ) -> Node:
        """A PPO run of an arm from `policy`.

        Args:
          inputs: "reward": the reward model; none: the critic rates. "reference": None: the policy as it starts.
          seed: of its prompts' order and samples; None: the replicate's.
        """

        def run(i: Mapping[str, Artifact]) -> Artifact:
            start = sft_count(i["prompts"].metrics["train"], arm.share)
            return ppo.run(
                self.ctx,
                i["prompts"],
                i["model"],
                spec,
                rewards=_sources(arm, i.get("reward")),
                reference=i.get("reference"),
                start=start,
                seed=seed,
            )

        known = {"prompts": self.prompts, "model": policy, **inputs}
        return Node(name=name, run=run, inputs=known, arm=arm.name, seed=self.ctx.seed)

    def _ppo_runs(self, arm: ArmSpec) -> dict[Setting, Node]:
        spec = self.config.ppo
        assert spec is not None
        own = spec.model_copy(update={"sweep": None})
        runs = {(own.kl.coef, own.optimizer.learning_rate): self._ppo(arm, own)}
        if spec.sweep is not None:
            for coef, rate in itertools.product(spec.sweep.kl_coefs, spec.sweep.learning_rates):
                if (coef, rate) not in runs:
                    runs[coef, rate] = self._ppo(arm, _at(own, coef, rate))
        return runs

    # ---- arms --------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def _chain(self, arm: ArmSpec) -> tuple[Node, ...]:
        """The training nodes of an arm, in order; the last one's model is the arm's (that of `best_of_n` is the
        first's)."""
        first = self.sft(arm.teacher, arm.share)
        match arm.optimize:
            case "none":
                return (first,)
            case "dpo":
                tuned = self.node(
                    f"dpo {arm.name}",
                    lambda i: dpo.run(self.ctx, i["model"], i["labels"]),
                    arm=arm.name,
                    model=first,
                    labels=self._labels(arm),
                )
                return (first, tuned)
            case "ppo":
                own = next(iter(self._ppo_runs(arm).values()))
                return (first, *([self._reward(arm)] if arm.reward == "model" else []), own)
            case "best_of_n":
                return (first, self._reward(arm))
            case "rejection_sampling":
                return (first, self._reward(arm), self._rejection(arm))
        trained = [node for made in self._rounds(arm) for node in (made.reward, made.policy) if node]
        return (first, *trained)

    @functools.cache  # noqa: B019
    def _rounds(self, arm: ArmSpec) -> tuple[Round, ...]:
        return make_rounds(self, arm)

    @functools.cache  # noqa: B019
    def _best(self, arm: ArmSpec) -> Node:
        """The best of several samples of the SFT policy: on the evaluation prompts, which are then the arm's answers;
        or, for rejection sampling, on the training prompts that SFT did not use."""
        config, name = self.config, f"sft {arm.teacher} {arm.share:.0%}"
        if arm.optimize == "best_of_n":
            assert config.best_of_n is not None
            split, size = "eval", config.evaluation.sampling.batch_size
            spec = config.evaluation.sampling.model_copy(update={"samples": config.best_of_n.n})
            samples = self.node(
                f"{config.best_of_n.n} evaluation samples each of {name}",
                lambda i: self.sample(i, name, split, spec),
                prompts=self.prompts,
                model=self.sft(arm.teacher, arm.share),
            )
        else:
            assert config.rejection_sampling is not None
            split, size = "train", config.sampling.batch_size
            samples = self._policy_samples(arm.teacher, arm.share, config.rejection_sampling.n)
        return self.node(
            f"best samples of {arm.name}",
            lambda i: best_of_n.run(
                self.ctx,
                i["prompts"],
                i["samples"],
                i["reward"],
                split=split,
                generator=arm.name,
                batch_size=size,
            ),
            arm=arm.name,
            prompts=self.prompts,
            samples=samples,
            reward=self._reward(arm),
        )

    @functools.cache  # noqa: B019
    def _rejection(self, arm: ArmSpec) -> Node:
        spec = self.config.rejection_sampling
        assert spec is not None
        return self.node(
            f"rejection sampling {arm.name}",
            lambda i: rejection.run(self.ctx, i["prompts"], i["model"], i["best"], spec),
            arm=arm.name,
            prompts=self.prompts,
            model=self.sft(arm.teacher, arm.share),
            best=self._best(arm),
        )

    # ---- evaluation --------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def _arm_evaluation(self, arm: ArmSpec) -> Node:
        if arm.optimize == "best_of_n":
            return self.judged(self._best(arm), arm.name, arm.name)
        return self.evaluation(self._chain(arm)[-1], arm.name, arm.name)

    def _start(self, arm: ArmSpec) -> Node:
        """The evaluation of the SFT that an iterated arm starts from: that of the SFT arm, where there is one."""
        for other in self.arms:
            if (other.optimize, other.teacher, other.share) == ("none", arm.teacher, arm.share):
                return self._arm_evaluation(other)
        return self._start_of(arm.teacher, arm.share)

    @functools.cache  # noqa: B019
    def _start_of(self, teacher: str, share: float) -> Node:
        return self.evaluation(self.sft(teacher, share), f"sft {teacher} {share:.0%}", "")

    def evaluation(self, model: Node, name: str, arm: str) -> Node:
        """Samples of a model on the evaluation prompts and their judgement. Two arms never share a model, so each has
        its own."""
        samples = self.node(
            f"evaluation samples of {name}",
            lambda i: self.sample(i, name, "eval", self.config.evaluation.sampling),
            arm=arm,
            prompts=self.prompts,
            model=model,
        )
        return self.judged(samples, name, arm)

    def judged(self, samples: Node, name: str, arm: str) -> Node:
        """The judgement of answers to the evaluation prompts."""
        return self.node(
            f"evaluation of {name}",
            lambda i: evaluate.run(self.ctx, i["prompts"], i["samples"], i["references"]),
            arm=arm,
            prompts=self.prompts,
            samples=samples,
            references=self.references,
        )


def _has_labels(arm: ArmSpec) -> bool:
    if arm.optimize == "ppo":
        return arm.reward == "model"
    return arm.optimize in ("dpo", "best_of_n", "rejection_sampling")


def _has_reward(arm: ArmSpec) -> bool:
    return _has_labels(arm) and arm.optimize != "dpo"


def _sources(arm: ArmSpec, reward: Artifact | None) -> Mapping[str, tuple[RewardSource, Artifact | None]]:
    """What PPO is rewarded by: the reward model that a stage made, or else the arm's critic itself."""
    if reward is None:
        return {"critic": (RewardSource(critic=arm.critic), None)}
    return {"reward": (RewardSource(model=str(reward.path)), reward)}


def _at(spec: PpoSpec, coef: float, rate: float) -> PpoSpec:
    """The same run with another KL coefficient and learning rate."""
    return spec.model_copy(
        update={
            "kl": spec.kl.model_copy(update={"coef": coef}),
            "optimizer": spec.optimizer.model_copy(update={"learning_rate": rate}),
        }
    )


def _point(spec: PpoSpec, own: PpoSpec | None) -> str:
    """What sets a run of the sweep apart, for its node's name."""
    setting = (spec.kl.coef, spec.optimizer.learning_rate)
    if own is not None and setting == (own.kl.coef, own.optimizer.learning_rate):
        return ""
    return f", KL coefficient {setting[0]:g}, learning rate {setting[1]:.3g}"
