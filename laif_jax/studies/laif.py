"""The LAIF matrix as a graph of stages (Sharma et al. 2024): arms share every prefix that they can.

For each replicate: prompts -> base model -> teacher completions -> SFT on a share -> [samples -> critic -> DPO] ->
samples on the evaluation prompts -> judge. Two arms that start from the same SFT share its node.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from laif_jax.config import ArmSpec, SamplingSpec, StudyConfig, expand_arms
from laif_jax.stages import agreement, base, dpo, evaluate, label, prompts, sample, sft, teach
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import StudyContext
from laif_jax.stages.split import sft_count
from laif_jax.studies.graph import Node

Run = Callable[[Mapping[str, Artifact]], Artifact]


@dataclasses.dataclass(frozen=True)
class Replicate:
    """The nodes of one seed. `arms`: each arm's evaluation; `training`: the training nodes behind it, in order."""

    seed: int
    arms: Mapping[str, Node]
    training: Mapping[str, tuple[Node, ...]]
    labels: Mapping[str, Node]
    agreement: Node | None


def build(ctx: StudyContext) -> Replicate:
    """The graph of one replicate. Nothing is run."""
    return _Builder(ctx).replicate()


class _Builder:
    """Makes nodes; each `functools.cache`d method returns the same node for the same arguments, which is what makes
    prefixes shared."""

    def __init__(self, ctx: StudyContext):
        self.ctx = ctx
        self.config: StudyConfig = ctx.config
        self.arms = expand_arms(ctx.config)

    def replicate(self) -> Replicate:
        chains = {arm.name: self._chain(arm) for arm in self.arms}
        judged = self.config.evaluation.agreement
        return Replicate(
            seed=self.ctx.seed,
            arms={name: self._evaluation(chain[-1], name) for name, chain in chains.items()},
            training=chains,
            labels={arm.name: self._labels(arm) for arm in self.arms if arm.optimize != "none"},
            agreement=self._node("judge agreement", lambda _: agreement.run(self.ctx)) if judged else None,
        )

    # ---- shared nodes ------------------------------------------------------------------------------------------

    def _node(self, name: str, run: Run, *, arm: str = "", **inputs: Node) -> Node:
        return Node(name=name, run=run, inputs=inputs, arm=arm, seed=self.ctx.seed)

    @functools.cached_property
    def prompts(self) -> Node:
        return self._node("prompts", lambda _: prompts.run(self.ctx))

    @functools.cached_property
    def base(self) -> Node:
        return self._node("base model", lambda _: base.run(self.ctx))

    @functools.cached_property
    def references(self) -> Node:
        name = self.config.evaluation.reference
        return self._node(
            f"reference completions of {name}",
            lambda i: teach.run(self.ctx, i["prompts"], teacher=name, split="eval"),
            prompts=self.prompts,
        )

    @functools.cache  # noqa: B019 - the builder lives as long as one call of `build`
    def _teacher(self, name: str) -> Node:
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

        return self._node(f"teacher {name}", run, prompts=self.prompts)

    @functools.cache  # noqa: B019
    def _sft(self, teacher: str, share: float) -> Node:
        return self._node(
            f"sft {teacher} {share:.0%}",
            lambda i: sft.run(self.ctx, i["base"], i["prompts"], i["teacher"], share=share),
            base=self.base,
            prompts=self.prompts,
            teacher=self._teacher(teacher),
        )

    @functools.cache  # noqa: B019
    def _policy_samples(self, teacher: str, share: float, count: int) -> Node:
        """Samples of the SFT policy on the prompts that its SFT did not use."""
        spec = self.config.sampling.model_copy(update={"samples": count})

        def run(inputs: Mapping[str, Artifact]) -> Artifact:
            start = sft_count(inputs["prompts"].metrics["train"], share)
            return self._sample(inputs, f"sft {teacher} {share:.0%}", "train", spec, start)

        return self._node(
            f"samples of sft {teacher} {share:.0%}",
            run,
            prompts=self.prompts,
            model=self._sft(teacher, share),
        )

    def _sample(
        self, inputs: Mapping[str, Artifact], generator: str, split: str, spec: SamplingSpec, start: int = 0
    ) -> Artifact:
        return sample.run(
            self.ctx,
            inputs["prompts"],
            inputs["model"],
            generator=generator,
            split=split,
            spec=spec,
            max_prompt_length=self.config.sft.max_prompt_length,
            start=start,
        )

    # ---- arms --------------------------------------------------------------------------------------------------

    def _chain(self, arm: ArmSpec) -> tuple[Node, ...]:
        """The training nodes of an arm, in order; the last one's model is the arm's."""
        first = self._sft(arm.teacher, arm.share)
        if arm.optimize == "none":
            return (first,)
        tuned = self._node(
            f"dpo {arm.name}",
            lambda i: dpo.run(self.ctx, i["model"], i["labels"]),
            arm=arm.name,
            model=first,
            labels=self._labels(arm),
        )
        return (first, tuned)

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
            inputs=inputs | ({"teacher": self._teacher(teacher)} if against_teacher else {}),
            seed=self.ctx.seed,
        )

    def _evaluation(self, model: Node, name: str) -> Node:
        """Samples on the evaluation prompts and their judgement. Two arms never share a model, so each has its own."""
        samples = self._node(
            f"evaluation samples of {name}",
            lambda i: self._sample(i, name, "eval", self.config.evaluation.sampling),
            arm=name,
            prompts=self.prompts,
            model=model,
        )
        return self._node(
            f"evaluation of {name}",
            lambda i: evaluate.run(self.ctx, i["prompts"], i["samples"], i["references"]),
            arm=name,
            prompts=self.prompts,
            samples=samples,
            references=self.references,
        )
