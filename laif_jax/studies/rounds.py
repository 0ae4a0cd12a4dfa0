"""Rounds of feedback as nodes: sample from the current policy -> ask -> [reward model] -> DPO or PPO -> [evaluate].

A round that a bound does not allow is not begun: each of its nodes then hands on what the round before left, so that
the policy so far is the arm's. Whether it may begin is known only when the rounds before it are done; the nodes are
there from the start.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from laif_jax.config import ArmSpec, IterateSpec
from laif_jax.stages import dpo, human, label, reward
from laif_jax.stages import rounds as rounds_stage
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.rounds import was_begun
from laif_jax.stages.split import round_share
from laif_jax.studies.graph import Node

if TYPE_CHECKING:
    from laif_jax.studies.laif import Builder

Run = Callable[[Mapping[str, Artifact]], Artifact]
# Between the seeds of two rounds' rollouts, far from those of replicates.
SEED_STEP = 1_000_003


@dataclasses.dataclass(frozen=True)
class Round:
    """The nodes of one round.

    Attributes:
      begin: whether it may begin, and on which prompts. policy: the model it ends with.
      reward: the reward model, where there is one. evaluation: of `policy`; None: of the last round alone.
    """

    number: int
    begin: Node
    samples: Node
    labels: Node
    reward: Node | None
    policy: Node
    evaluation: Node | None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that hand on what was there before, where the round is not begun."""
        made = (self.samples, self.labels, self.reward, self.policy, self.evaluation)
        return tuple(node for node in made if node is not None)


def make_rounds(builder: "Builder", arm: ArmSpec) -> tuple[Round, ...]:
    """The rounds of an iterated arm, in order."""
    spec = builder.config.iterate
    assert spec is not None  # checked when the configuration was read
    made: list[Round] = []
    for number in range(1, spec.rounds + 1):
        made.append(_Maker(builder, arm, spec, number, made).round())
    return tuple(made)


class _Maker:
    """Makes the nodes of one round."""

    def __init__(
        self, builder: "Builder", arm: ArmSpec, spec: IterateSpec, number: int, earlier: Sequence[Round]
    ):
        self.builder, self.ctx, self.arm, self.spec, self.number = builder, builder.ctx, arm, spec, number
        self.earlier = list(earlier)
        self.start = builder.sft(arm.teacher, arm.share)
        self.policy = earlier[-1].policy if earlier else self.start
        self.name = f"{arm.name}, round {number}"

    def round(self) -> Round:
        begin = self._begin()
        samples = self._samples(begin)
        labels = self._labels(begin, samples)
        window = [*(r.labels for r in self.earlier), labels][-(self.spec.max_staleness + 1) :]
        model = self._reward(begin, window) if self.arm.optimize == "iterated_ppo" else None
        policy = self._ppo(begin, model) if model else self._dpo(begin, window)
        last = self.number == self.spec.rounds
        wanted = self.spec.evaluate and not last  # the last one's is the arm's
        return Round(
            self.number,
            begin,
            samples,
            labels,
            model,
            policy,
            self._evaluation(begin, policy) if wanted else None,
        )

    def _node(
        self, what: str, run: Run, begin: Node, inputs: Mapping[str, Node], *, otherwise: str = "begin"
    ) -> Node:
        """A node that runs if the round was begun, and else hands on its input `otherwise`."""

        def guarded(i: Mapping[str, Artifact]) -> Artifact:
            return run(i) if was_begun(i["begin"]) else i[otherwise]

        return self._made(f"{what} {self.name}", guarded, {"begin": begin, **inputs})

    def _made(self, name: str, run: Run, inputs: Mapping[str, Node]) -> Node:
        return Node(name=name, run=run, inputs=inputs, arm=self.arm.name, seed=self.ctx.seed)

    def _begin(self) -> Node:
        inputs = {"prompts": self.builder.prompts}
        if self.earlier:
            inputs["previous"] = self.earlier[-1].begin
            # Asked for after the round before is done, not while it may still fail.
            inputs["policy"] = self.policy
        inputs |= {f"labels{r.number}": r.labels for r in self.earlier}
        config = self.builder.config
        asked = None
        if self.spec.labels == "critic":
            asked = config.endpoints[config.critics[self.arm.critic or ""].endpoint]

        def run(i: Mapping[str, Artifact]) -> Artifact:
            return rounds_stage.begin(
                self.ctx,
                i["prompts"],
                self.spec,
                number=self.number,
                share=self.arm.share,
                endpoint=asked,
                previous=i.get("previous"),
                labels=[i[f"labels{r.number}"] for r in self.earlier],
            )

        return self._made(f"begin {self.name}", run, inputs)

    def _samples(self, begin: Node) -> Node:
        against_teacher = self.arm.pairs == "policy_vs_teacher"
        spec = self.builder.config.sampling.model_copy(update={"samples": 1 if against_teacher else 2})
        generator = f"{self.arm.name}, round {self.number - 1}" if self.earlier else self.start.name

        def run(i: Mapping[str, Artifact]) -> Artifact:
            slice_ = i["begin"].metrics
            return self.builder.sample(i, generator, "train", spec, slice_["start"], slice_["stop"])

        return self._node("samples of", run, begin, {"prompts": self.builder.prompts, "model": self.policy})

    def _labels(self, begin: Node, samples: Node) -> Node:
        critic = self.arm.critic or ""
        inputs = {"prompts": self.builder.prompts, "samples": samples}
        if self.arm.pairs == "policy_vs_teacher":
            inputs["teacher"] = self.builder.teacher(self.arm.teacher)

        def run(i: Mapping[str, Artifact]) -> Artifact:
            if self.spec.labels == "human":
                return human.run(self.ctx, i["prompts"], i["samples"], i.get("teacher"))
            return label.run(self.ctx, i["prompts"], i["samples"], i.get("teacher"), critic=critic)

        return self._node("labels of", run, begin, inputs)

    def _window(self, window: Sequence[Node]) -> dict[str, Node]:
        return {f"labels{index}": node for index, node in enumerate(window)}

    def _pooled(self, i: Mapping[str, Artifact], count: int) -> Artifact:
        return rounds_stage.pool(self.ctx, [i[f"labels{index}"] for index in range(count)])

    def _reward(self, begin: Node, window: Sequence[Node]) -> Node:
        """A fresh reward model from the SFT policy, as HH-RLHF's are every week."""
        spec = self.builder.config.reward
        assert spec is not None

        def run(i: Mapping[str, Artifact]) -> Artifact:
            labels = [i[f"labels{index}"] for index in range(len(window))]
            return reward.run(self.ctx, i["model"], labels, spec)

        return self._node("reward model of", run, begin, {"model": self.start, **self._window(window)})

    def _dpo(self, begin: Node, window: Sequence[Node]) -> Node:
        spec = self.builder.config.dpo
        assert spec is not None
        if spec.steps is not None:
            spec = spec.model_copy(update={"steps": round_share(spec.steps, self.spec.rounds, self.number)})
        initial = self.spec.reference == "initial"

        def run(i: Mapping[str, Artifact]) -> Artifact:
            labels = self._pooled(i, len(window))
            return dpo.run(self.ctx, i["model"], labels, reference=i["start"] if initial else None, spec=spec)

        inputs = {"model": self.policy, **self._window(window)} | ({"start": self.start} if initial else {})
        return self._node("dpo", run, begin, inputs, otherwise="model")

    def _ppo(self, begin: Node, model: Node) -> Node:
        """PPO for this round's share of the iterations, over all prompts that SFT did not use."""
        spec = self.builder.config.ppo
        assert spec is not None
        iterations = round_share(spec.iterations, self.spec.rounds, self.number)
        spec = spec.model_copy(update={"iterations": iterations, "sweep": None})
        inputs = {"reward": model} | ({"reference": self.start} if self.spec.reference == "initial" else {})
        made = self.builder.ppo(
            "ppo",
            self.arm,
            spec,
            self.policy,
            inputs,
            # Other prompts first, and other random numbers, than in the round before.
            seed=self.ctx.seed + SEED_STEP * (self.number - 1),
        )
        return self._node("ppo", made.run, begin, made.inputs, otherwise="model")

    def _evaluation(self, begin: Node, policy: Node) -> Node:
        made = self.builder.evaluation(policy, self.name, self.arm.name)
        drawn = made.inputs["samples"]
        samples = self._node("evaluation samples of", drawn.run, begin, drawn.inputs)
        return self._node("evaluation of", made.run, begin, {**made.inputs, "samples": samples})
