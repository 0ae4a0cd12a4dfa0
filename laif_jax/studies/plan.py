"""What a study will ask of other models: calls, tokens, dollars and time, before anything is sent.

Calls are counted from the study's graph and its prompts, for an empty store: what is stored already is not asked again.
Where their number depends on the run, it is the most that they can be, and the row says why. Tokens are estimated (see
`labeling.plan`), so dollars and time are too; with a `--budget` the service holds the money itself.
"""

import datetime
import logging
from collections.abc import Callable, Iterable, Sequence

from etils import epath

from laif_jax.config import ArmSpec, CriticSpec, PpoConfig, PpoSpec, RunConfig, StudyConfig, TeacherSpec
from laif_jax.config.endpoints import StrongSpec, VoiceSpec
from laif_jax.data.readers import resolve
from laif_jax.data.sources import load_prompts
from laif_jax.evaluation.agreement import read_human_labels
from laif_jax.labeling.critic import Critic, instruction_text, load_critic
from laif_jax.labeling.plan import ESTIMATED, Plan, PlanRow, check_askable, fixed_tokens, show_plan, tokens_of
from laif_jax.labeling.prices import need_price
from laif_jax.labeling.probe import probe_set
from laif_jax.labeling.revise import load_reviser
from laif_jax.records import Prompt, write_json
from laif_jax.records.errors import LaifError
from laif_jax.stages.context import Services, StudyContext
from laif_jax.stages.label import load_voice
from laif_jax.stages.split import round_slice, sft_count
from laif_jax.studies.graph import ordered
from laif_jax.studies.laif import Builder, Replicate
from laif_jax.studies.report import print_text

__all__ = ["Plan", "PlanRow", "announce", "plan_ppo", "plan_study", "show_plan"]

logger = logging.getLogger(__name__)

EQUAL = "pairs of equal or empty answers are not asked about, and an equal question is asked once"
STRONG = "it is asked only where the first tier is not sure"
BOUNDED = "a round that `iterate.max_comparisons` or `iterate.max_cost` does not allow is not begun"
RATED = "equal answers to one prompt are rated once, and no call begins after `max_wait`"
REVISED = "an answer that failed is not revised"


def plan_study(config: StudyConfig) -> Plan:
    """The plan of a study.

    Raises:
      DataError: its prompts cannot be read. CriticError: a critic is missing.
    """
    return _StudyPlanner(config).plan()


def plan_ppo(config: PpoConfig) -> Plan:
    """The plan of `laif ppo`: what critics that rate are asked. Raises as `plan_study`."""
    planner = _Planner(config)
    train, evaluation = _prompts(config, config.seed)
    for name, source in config.rewards.items():
        if source.critic is not None:
            planner.ratings(name, config.critics[source.critic], config.ppo, train, evaluation)
    return planner.finish([])


def announce(config: RunConfig, make: Callable[[], Plan], root: epath.Path) -> Plan | None:
    """Prints what a run will ask for before anything is sent, if it asks for anything, and keeps it as `plan.json`.

    Returns:
      The plan; None if it cannot be made, which is logged and stops nothing.

    Raises:
      EndpointError: there is a budget, and a model without a price.
    """
    try:
        plan = make()
    except (LaifError, OSError) as error:
        logger.warning("what this run will ask for cannot be told: %s", error)
        plan = None
    write_json(root / "plan.json", plan.to_json() if plan else {"rows": [], "nanos": None})
    if plan is None:
        return None
    if plan.rows:
        print_text(f"planned, before anything is sent:\n{show_plan(plan)}")
    if config.labeling.budget not in (None, "none") or config.labeling.job_budget:
        for row in plan.rows:
            need_price(config.endpoints[row.endpoint], datetime.datetime.now(datetime.UTC).date())
    return plan


def _prompts(config: StudyConfig | PpoConfig, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of one replicate, as the stage `prompts` keeps them: (train, eval)."""
    data = config.data
    rows = load_prompts(data.eval, data.root, config.seed, data.symbols, shuffle=False)
    evaluation = [row.prompt for row in rows]
    held_out = {prompt.id for prompt in evaluation}
    loaded = load_prompts(data.train, data.root, seed, data.symbols)
    return [row.prompt for row in loaded if row.prompt.id not in held_out], evaluation


class _Planner:
    """Counts what critics are asked."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rows: dict[tuple[str, str], PlanRow] = {}
        self.voices: dict[tuple[str, str], tuple[str, VoiceSpec, Critic]] = {}  # who a drift probe is put to

    def judge(
        self, role: str, name: str, spec: CriticSpec, shown: Sequence[int], bounds: Iterable[str] = (EQUAL,)
    ) -> None:
        """Adds the questions of a critic, an ensemble or two tiers.

        Args:
          shown: for each comparison (of a critic that ranks: for each list) the tokens of its prompt and answers.
        """
        for number, voice in enumerate(spec.voices):
            who = name if number == 0 else f"{name} + {voice.endpoint}"
            reasons = list(bounds)
            if isinstance(voice, StrongSpec):
                who = f"{name} > {voice.endpoint}"
                reasons.append(STRONG)
            critic = load_voice(voice)
            check_askable(self.config.endpoints[voice.endpoint], critic)
            self.voices.setdefault((voice.endpoint, critic.hash), (who, voice, critic))
            row = self.row(role, who, voice.endpoint, critic.name)
            add_verdicts(row, critic, voice.order, shown)
            for why in reasons:
                row.bound(why)

    def ratings(
        self, name: str, spec: CriticSpec, ppo: PpoSpec, train: Sequence[Prompt], held_out: Sequence[Prompt]
    ) -> None:
        """Adds a critic's ratings of every rollout of a PPO run, and of the evaluations on held-out prompts."""
        critic = load_critic(spec.critic)
        check_askable(self.config.endpoints[spec.endpoint], critic)
        row = self.row("reward", name, spec.endpoint, critic.name)
        row.bound(RATED)
        asked = ppo.iterations * ppo.batch_size * ppo.sampling.samples
        shown = held_out[: ppo.eval_prompts]
        for prompts, count in ((train, asked), (shown, _evaluations(ppo) * len(shown))):
            if prompts:
                lengths = [tokens_of([instruction_text(prompt)]) for prompt in prompts]
                mean = -(-sum(lengths) // len(lengths))
                answer = ppo.sampling.max_new_tokens
                row.add(count, fixed_tokens(critic)[1] + mean + answer, critic.max_tokens)

    def probes(self) -> None:
        """Adds the drift probe of every critic that compares, once: it is put again on another day only."""
        if self.config.labeling.probe is None:
            return
        pairs = probe_set(self.config.labeling.probe)
        shown = [tokens_of([instruction_text(p.prompt), p.a.text, p.b.text]) for p in pairs]
        for name, voice, critic in self.voices.values():
            if critic.kind == "comparison":
                row = self.row("probe", name, voice.endpoint, critic.name)
                row.bound("it is put once a day")
                add_verdicts(row, critic, "both", shown)

    def row(self, role: str, name: str, endpoint: str, critic: str = "") -> PlanRow:
        spec = self.config.endpoints[endpoint]
        return self.rows.setdefault((role, name), PlanRow(role, name, endpoint, spec, critic))

    def finish(self, notes: Sequence[str]) -> Plan:
        self.probes()
        counted = "calls: for an empty store; what is stored already is not asked again"
        about = [*ESTIMATED, counted] if self.rows else []
        return Plan(list(self.rows.values()), [*about, *notes])


def add_verdicts(row: PlanRow, critic: Critic, order: str, shown: Iterable[int]) -> None:
    """Adds one critic's calls: a verdict per sample and order, and the rationale before it where one is asked for.

    Args:
      shown: for each comparison the tokens of its prompt and answers.
    """
    times = critic.samples * (2 if order == "both" else 1)
    first, verdict = fixed_tokens(critic)
    thought = critic.rationale.max_tokens if critic.rationale else 0
    for tokens in shown:
        if thought:
            row.add(times, first + tokens, thought)
        row.add(times, verdict + tokens + thought, critic.max_tokens)


def _evaluations(ppo: PpoSpec) -> int:
    """How often a PPO run is evaluated: before it, every `eval_every` iterations, and at the end."""
    if not ppo.eval_every:
        return 2
    return 1 + -(-ppo.iterations // ppo.eval_every)


class _StudyPlanner(_Planner):
    config: StudyConfig

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config)
        # Prompts by teacher: the same one is asked once, whatever the replicate.
        self.asked: dict[str, set[str]] = {}
        self.failed: dict[str, str] = {}  # why something could not be planned
        self.people = 0  # comparisons that people are asked about

    def plan(self) -> Plan:
        config = self.config
        root = epath.Path(config.out) / config.name
        for index in range(config.seeds):
            seed = config.seed + index
            train, evaluation = _prompts(config, seed)
            services = Services(config, root)  # starts nothing before it is used
            builder = Builder(StudyContext(config=config, root=root, seed=seed, services=services))
            replicate = builder.replicate()
            self._teachers(builder, replicate, train, evaluation)
            self._labels(builder.arms, replicate, train)
            for arm in builder.arms:
                if arm.name in replicate.rounds:
                    self._try(arm.name, self._rounds, arm, train)
                if arm.optimize == "ppo" and arm.reward == "critic":
                    runs = len(replicate.runs[arm.name])
                    left = train[sft_count(len(train), arm.share) :]
                    self._try(arm.name, self._ppo, arm, runs, left, evaluation)
            self._try("the judge", self._evaluations, replicate, evaluation)
        if config.evaluation.agreement:
            self._try("the judge's agreement with people", self._agreement)
        return self.finish(self._notes())

    def _try(self, what: str, count: Callable[..., None], *given: object) -> None:
        """Counts, or notes why that cannot be done: the rest of the plan is of use without it."""
        try:
            count(*given)
        except LaifError as error:
            self.failed[what] = str(error)

    # ---- teachers ------------------------------------------------------------------------------------------------

    def _teachers(
        self, builder: Builder, replicate: Replicate, train: Sequence[Prompt], evaluation: Sequence[Prompt]
    ) -> None:
        names = {node.name for node in ordered(replicate.targets())}
        for name in self.config.teachers:
            if f"teacher {name}" in names:
                arms = [arm for arm in builder.arms if arm.teacher == name]
                whole = any(arm.pairs == "policy_vs_teacher" for arm in arms)
                share = 1.0 if whole else max(arm.share for arm in arms)
                self._try(f"teacher {name}", self._complete, name, train[: sft_count(len(train), share)])
            if f"reference completions of {name}" in names:
                self._try(f"teacher {name}", self._complete, name, evaluation)

    def _complete(self, name: str, prompts: Iterable[Prompt]) -> None:
        spec = self.config.teachers[name]
        if spec.endpoint is None:
            return
        asked = self.asked.setdefault(name, set())
        row = self.row("teacher", name, spec.endpoint)
        for prompt in prompts:
            if prompt.id not in asked:
                asked.add(prompt.id)
                texts = [message.content for message in prompt.messages] + [spec.system or ""]
                row.add(1, tokens_of(texts), spec.max_tokens)
                if spec.revisions:
                    self._revise(name, spec, tokens_of(texts))

    def _revise(self, name: str, spec: TeacherSpec, shown: int) -> None:
        """Two calls per step: each shows the conversation and the answer, the second the critique too."""
        reviser = load_reviser(spec.reviser, spec.principles)
        row = self.row("revision", name, spec.endpoint or "", reviser.name)
        row.bound(REVISED)
        answer = max(spec.max_tokens, reviser.revision_tokens)
        values = dict.fromkeys(("instruction", "response", "principle", "critique", "request"), "")
        longest = max(tokens_of([p.text, p.revision]) for p in reviser.principles)
        for part, tokens in (("critique", reviser.critique_tokens), ("revision", reviser.revision_tokens)):
            fixed = tokens_of(message["content"] for message in reviser.messages(part, values))
            seen = shown + answer + fixed + longest + (reviser.critique_tokens if part == "revision" else 0)
            row.add(spec.revisions, seen, tokens)

    # ---- critics -------------------------------------------------------------------------------------------------

    def _labels(self, arms: Sequence[ArmSpec], replicate: Replicate, train: Sequence[Prompt]) -> None:
        """Labels of one round; arms that learn from the same ones share them."""
        shared = {
            id(replicate.labels[arm.name]): arm for arm in reversed(arms) if arm.name in replicate.labels
        }
        for arm in reversed(shared.values()):
            left = train[sft_count(len(train), arm.share) :]
            self._try(arm.name, self._compare, arm, left)

    def _compare(self, arm: ArmSpec, prompts: Sequence[Prompt], bounds: Iterable[str] = (EQUAL,)) -> None:
        """A comparison per prompt: two samples of the policy, or one against the teacher's answer."""
        answers = 2 * self.config.sampling.max_new_tokens
        if arm.pairs == "policy_vs_teacher":
            answers = self.config.sampling.max_new_tokens + self.config.teachers[arm.teacher].max_tokens
        name = arm.critic or ""
        self.judge("critic", name, self.config.critics[name], _shown(prompts, answers), bounds)

    def _rounds(self, arm: ArmSpec, train: Sequence[Prompt]) -> None:
        """All rounds; no more than `max_comparisons` are ever asked for."""
        spec = self.config.iterate
        assert spec is not None  # checked when the configuration was read
        left: list[Prompt] = []
        for number in range(1, spec.rounds + 1):
            start, stop = round_slice(len(train), arm.share, spec, number)
            left += train[start:stop]
        bounded = spec.max_comparisons is not None or spec.max_cost is not None
        left = left[: spec.max_comparisons]
        if spec.labels == "human":
            self.people += len(left)
        else:
            self._compare(arm, left, (EQUAL, BOUNDED) if bounded else (EQUAL,))

    def _ppo(self, arm: ArmSpec, runs: int, train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> None:
        """Ratings of an arm's own run, and of those of its sweep."""
        assert self.config.ppo is not None  # checked when the configuration was read
        name = arm.critic or ""
        for _ in range(runs):
            self.ratings(name, self.config.critics[name], self.config.ppo, train, evaluation)

    # ---- the judge -----------------------------------------------------------------------------------------------

    def _evaluations(self, replicate: Replicate, prompts: Sequence[Prompt]) -> None:
        """Of every arm and every round, and of what the rounds started from."""
        rounds = [r.evaluation for made in replicate.rounds.values() for r in made if r.evaluation]
        judged = {id(node) for node in (*replicate.arms.values(), *replicate.starts.values(), *rounds)}
        spec = self.config.evaluation
        answers = spec.sampling.max_new_tokens + self.config.teachers[spec.reference].max_tokens
        iterate = self.config.iterate
        bounded = rounds and iterate and (iterate.max_comparisons or iterate.max_cost)
        for _ in judged:
            bounds = (EQUAL, BOUNDED) if bounded else (EQUAL,)
            self.judge("judge", spec.judge.endpoint, spec.judge, _shown(prompts, answers), bounds)

    def _agreement(self) -> None:
        spec = self.config.evaluation
        path = resolve(spec.agreement or "", self.config.data.root)
        rows = read_human_labels(path, limit=spec.agreement_limit, seed=self.config.seed)
        shown = [tokens_of([row.prompt, row.a, row.b]) for row in rows if row.a != row.b]
        self.judge("agreement", spec.judge.endpoint, spec.judge, shown)

    def _notes(self) -> list[str]:
        notes = [f"people are asked about {self.people:,} comparisons at most"] if self.people else []
        if self.config.iterate and self.config.iterate.max_cost:
            notes.append(
                f"each arm's rounds stop before {self.config.iterate.max_cost:g} US dollars are passed"
            )
        return notes + [f"could not be planned: {name}: {why}" for name, why in sorted(self.failed.items())]


def _shown(prompts: Iterable[Prompt], answers: int) -> list[int]:
    return [answers + tokens_of([instruction_text(prompt)]) for prompt in prompts]
