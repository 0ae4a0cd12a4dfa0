"""What a study will ask of other models: calls, tokens, dollars and time, before anything is sent.

Calls are counted exactly, from the study's graph and its prompts, for an empty store: what is stored already is not
asked again. Tokens are estimated (four bytes each; texts that do not exist yet are taken at their longest), so dollars
and time are estimates that lean upwards; with a `--budget` the service holds the money itself.
"""

import dataclasses
import datetime
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from laif_jax.config import CriticSpec, EndpointSpec, StudyConfig, TeacherSpec
from laif_jax.config.endpoints import StrongSpec, VoiceSpec
from laif_jax.data.sources import load_prompts
from laif_jax.labeling.budget import show_money
from laif_jax.labeling.critic import Critic, instruction_text
from laif_jax.labeling.prices import cost, price_of
from laif_jax.labeling.revise import load_reviser
from laif_jax.records import Prompt, Usage
from laif_jax.records.errors import LaifError
from laif_jax.stages.context import Services, StudyContext
from laif_jax.stages.label import load_voice
from laif_jax.stages.split import sft_count
from laif_jax.studies.graph import ordered
from laif_jax.studies.laif import Builder

BYTES_PER_TOKEN = 4
SECONDS_FIRST, TOKENS_PER_SECOND = 0.5, 50.0  # of a hosted model, where the endpoint's latency is not known
_LABELS = re.compile(r"labels by (.+), policy vs (policy|teacher), sft (.+) (\d+)%")


@dataclasses.dataclass
class PlanRow:
    """What one role asks of one endpoint. `nanos`: nano-dollars; None: its price is not known. `critic`: its data
    file's name; "" of a teacher."""

    role: str
    name: str
    endpoint: str
    model: str
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nanos: int | None = None
    seconds: float = 0.0
    warning: str = ""
    critic: str = ""

    def add(self, calls: int, prompt_tokens: int, completion_tokens: int) -> None:
        self.calls += calls
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens


@dataclasses.dataclass
class Plan:
    """All rows; `notes`: what could not be counted, and how tokens were estimated."""

    rows: list[PlanRow]
    notes: list[str]

    @property
    def nanos(self) -> int | None:
        """All dollars; None if a price is missing."""
        known = [row.nanos for row in self.rows]
        return None if None in known else sum(nanos for nanos in known if nanos is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "nanos": self.nanos,
            "notes": self.notes,
        }


def plan_study(config: StudyConfig) -> Plan:
    """The plan of a study.

    Raises:
      DataError: its prompts cannot be read. CriticError: a critic is missing.
    """
    return _Planner(config).plan()


class _Planner:
    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.rows: dict[tuple[str, str], PlanRow] = {}
        self.asked: dict[
            str, set[str]
        ] = {}  # prompts by teacher: the same one is asked once, whatever the replicate
        self.unknown: set[str] = set()
        self.failed: dict[str, str] = {}  # why a stage could not be planned
        self.strong: set[str] = set()  # second tiers

    def plan(self) -> Plan:
        config, data = self.config, self.config.data
        evaluation = [
            row.prompt for row in load_prompts(data.eval, data.root, config.seed, data.symbols, shuffle=False)
        ]
        held_out = {prompt.id for prompt in evaluation}
        root = epath.Path(config.out) / config.name
        for index in range(config.seeds):
            seed = config.seed + index
            loaded = load_prompts(data.train, data.root, seed, data.symbols)
            train = [row.prompt for row in loaded if row.prompt.id not in held_out]
            services = Services(config, root)  # starts nothing before it is used
            builder = Builder(StudyContext(config=config, root=root, seed=seed, services=services))
            replicate = builder.replicate()
            names = {node.name for node in ordered(replicate.targets())}
            self._teachers(builder, names, train, evaluation)
            for name in sorted(names):
                try:
                    self._stage(name, train, evaluation)
                except LaifError as error:
                    self.failed[name] = str(error)
        for row in self.rows.values():
            self._finish(row)
        return Plan(list(self.rows.values()), self._notes())

    # ---- counting ------------------------------------------------------------------------------------------------

    def _teachers(
        self, builder: Builder, names: set[str], train: Sequence[Prompt], evaluation: Sequence[Prompt]
    ) -> None:
        for name in self.config.teachers:
            if f"teacher {name}" in names:
                arms = [arm for arm in builder.arms if arm.teacher == name]
                whole = any(arm.pairs == "policy_vs_teacher" for arm in arms)
                share = 1.0 if whole else max(arm.share for arm in arms)
                self._complete(name, train[: sft_count(len(train), share)])
            if f"reference completions of {name}" in names:
                self._complete(name, evaluation)

    def _complete(self, name: str, prompts: Iterable[Prompt]) -> None:
        spec = self.config.teachers[name]
        if spec.endpoint is None:
            return
        asked = self.asked.setdefault(name, set())
        row = self._row("teacher", name, spec.endpoint)
        for prompt in prompts:
            if prompt.id not in asked:
                asked.add(prompt.id)
                texts = [message.content for message in prompt.messages] + [spec.system or ""]
                row.add(1, _tokens(texts), spec.max_tokens)
                self._revise(row, spec, _tokens(texts))

    def _revise(self, row: PlanRow, spec: TeacherSpec, shown: int) -> None:
        """Two calls per step: each shows the conversation and the answer, the second the critique too."""
        if not spec.revisions:
            return
        reviser = load_reviser(spec.reviser, spec.principles)
        answer = max(spec.max_tokens, reviser.revision_tokens)
        values = dict.fromkeys(("instruction", "response", "principle", "critique", "request"), "")
        longest = max(_tokens([p.text, p.revision]) for p in reviser.principles)
        for part, tokens in (("critique", reviser.critique_tokens), ("revision", reviser.revision_tokens)):
            fixed = _tokens([message["content"] for message in reviser.messages(part, values)])
            seen = shown + answer + fixed + longest + (reviser.critique_tokens if part == "revision" else 0)
            row.add(spec.revisions, spec.revisions * seen, spec.revisions * tokens)

    def _stage(self, name: str, train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> None:
        if match := _LABELS.fullmatch(name):
            critic, against, teacher, percent = match.groups()
            prompts = train[sft_count(len(train), int(percent) / 100) :]
            other = self._longest(self.config.teachers[teacher].max_tokens if against == "teacher" else None)
            self._judge("critic", critic, self.config.critics[critic], prompts, self._longest(None) + other)
        elif name.startswith("evaluation of "):
            judge = self.config.evaluation.judge
            sampled = self.config.evaluation.sampling.max_new_tokens
            reference = self.config.teachers[self.config.evaluation.reference].max_tokens
            self._judge("judge", judge.endpoint, judge, evaluation, sampled + reference)
        elif re.search(r"\bround\b|^ppo ", name):
            self.unknown.add(name)

    def _longest(self, tokens: int | None) -> int:
        return self.config.sampling.max_new_tokens if tokens is None else tokens

    def _judge(self, role: str, name: str, spec: CriticSpec, prompts: Sequence[Prompt], answers: int) -> None:
        for number, voice in enumerate(spec.voices):
            shown = name if number == 0 else f"{name} + {voice.endpoint}"
            if isinstance(voice, StrongSpec):
                shown = f"{name} > {voice.endpoint}"
                self.strong.add(shown)
            critic = load_voice(voice)
            row = self._row(role, shown, voice.endpoint, critic.name)
            self._ask(row, voice, critic, prompts, answers)

    def _ask(
        self, row: PlanRow, voice: VoiceSpec, critic: Critic, prompts: Sequence[Prompt], answers: int
    ) -> None:
        """One critic's calls: a verdict per sample and order, and the rationale before it where one is asked for."""
        orders = 2 if voice.order == "both" else 1
        first, verdict = _fixed_tokens(critic)
        thought = critic.rationale.max_tokens if critic.rationale else 0
        for prompt in prompts:
            shown = answers + _tokens([instruction_text(prompt)])
            prompt_tokens = (first + shown if thought else 0) + verdict + shown + thought
            times = orders * critic.samples
            row.add(
                orders * critic.calls_per_order, times * prompt_tokens, times * (thought + critic.max_tokens)
            )

    # ---- money and time ------------------------------------------------------------------------------------------

    def _row(self, role: str, name: str, endpoint: str, critic: str = "") -> PlanRow:
        spec = self.config.endpoints[endpoint]
        return self.rows.setdefault((role, name), PlanRow(role, name, endpoint, spec.model, critic=critic))

    def _finish(self, row: PlanRow) -> None:
        spec, today = self.config.endpoints[row.endpoint], datetime.datetime.now(datetime.UTC).date()
        price = price_of(spec, today)
        if price is None:
            row.warning = "its price is not known: give `prompt_price` and `completion_price`"
        else:
            usage = Usage(prompt_tokens=row.prompt_tokens, completion_tokens=row.completion_tokens)
            row.nanos = cost(price, usage, batch=spec.batch)
            row.warning = price.warning(today)
        row.seconds = row.calls * _latency(spec, row) / spec.concurrency

    def _notes(self) -> list[str]:
        notes = [
            f"{name}: at most; it is asked only where the first tier is not sure" for name in self.strong
        ]
        notes += [
            f"tokens are estimated: {BYTES_PER_TOKEN} bytes each; answers that do not exist yet at their longest",
            "time: from the endpoints' concurrency; a hosted model's latency is assumed, its rate limits are not known",
            "calls: for an empty store; what is stored already is not asked again",
        ]
        if self.unknown:
            notes.append(f"not counted, because it depends on the run: {', '.join(sorted(self.unknown))}")
        notes += [f"could not be planned: `{name}`: {why}" for name, why in sorted(self.failed.items())]
        if self.config.evaluation.agreement:
            notes.append("not counted: the judge's agreement with human labels")
        return notes


def _tokens(texts: Iterable[str]) -> int:
    return sum(
        math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + 4 for text in texts if text
    )


def _fixed_tokens(critic: Critic) -> tuple[int, int]:
    """Tokens of the prompts of the rationale (0 if none is asked for) and the verdict, without what is shown."""
    if critic.kind == "listwise":
        return 0, _tokens([message["content"] for message in critic.listwise_messages("", ["", ""])])
    first = critic.rationale_messages("", "", "") if critic.rationale else ()
    verdict = critic.messages("", "", "")
    return _tokens([m["content"] for m in first]), _tokens([m["content"] for m in verdict])


def _latency(spec: EndpointSpec, row: PlanRow) -> float:
    if spec.simulated is not None:
        return spec.simulated.latency
    return SECONDS_FIRST + row.completion_tokens / max(row.calls, 1) / TOKENS_PER_SECOND


def show_plan(plan: Plan) -> str:
    """The plan as a table for a terminal."""
    head = ("role", "who", "model", "calls", "prompt tok.", "compl. tok.", "dollars", "time")
    lines: list[tuple[str, ...]] = [head]
    for row in plan.rows:
        time = str(datetime.timedelta(seconds=round(row.seconds)))
        counts = [f"{n:,}" for n in (row.calls, row.prompt_tokens, row.completion_tokens)]
        lines.append((row.role, row.name, row.model, *counts, show_money(row.nanos), time))
    total = [
        f"{sum(getattr(row, name) for row in plan.rows):,}"
        for name in ("calls", "prompt_tokens", "completion_tokens")
    ]
    lines.append(("total", "", "", *total, show_money(plan.nanos), ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    warnings = [f"{row.name}: {row.warning}" for row in plan.rows if row.warning]
    return "\n".join([*table, "", *(f"* {note}" for note in (*plan.notes, *warnings))])
