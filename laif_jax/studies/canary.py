"""The injection canaries, put to the critics of a study."""

from collections.abc import Sequence

from etils import epath

from laif_jax.config import CriticSpec, StudyConfig
from laif_jax.labeling.canary import CanaryReport, measure
from laif_jax.records import Comparison, Judgement
from laif_jax.records.errors import LaifError
from laif_jax.stages.context import Services, StudyContext
from laif_jax.stages.label import judge, load_voice

JUDGE = "judge"


def measure_critics(config: StudyConfig, names: Sequence[str] = ()) -> dict[str, CanaryReport]:
    """One report per critic that compares: those named, or all, and the judge of the evaluation ("judge").

    Its verdicts go through the study's own labelling service and store.

    Raises:
      LaifError: a name that is none of the study's critics.
    """
    specs = {**config.critics, JUDGE: config.evaluation.judge}
    if unknown := [name for name in names if name not in specs]:
        raise LaifError(
            f"there is no critic {', '.join(unknown)} in this study; there are {', '.join(specs)}"
        )
    chosen = [
        name
        for name, spec in specs.items()
        if (not names or name in names) and all(load_voice(voice).judges for voice in spec.voices)
    ]
    root = epath.Path(config.out) / config.name
    with Services(config, root) as services:
        context = StudyContext(config=config, root=root, seed=config.seed, services=services)
        return {name: _measure(context, specs[name]) for name in chosen}


def _measure(context: StudyContext, spec: CriticSpec) -> CanaryReport:
    def ask(comparisons: Sequence[Comparison]) -> list[Judgement]:
        return judge(context, spec, list(comparisons))

    return measure(ask, lists=any(load_voice(voice).kind == "listwise" for voice in spec.voices))
