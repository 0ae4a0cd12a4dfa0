"""AlpacaEval's published judgements and leaderboards: our win rates must be theirs.

The data folder holds `alpaca_eval/judgements.jsonl.gz` (one row per published judgement: index, annotator,
generator_1, generator_2, run, preference, len_1, len_2) and `alpaca_eval/leaderboard_<annotator>.csv`.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass

from etils import epath

from laif_jax.evaluation.winrate import WinRate, p_from_preferences, win_rate
from laif_jax.records import DataError, read_jsonl
from laif_jax.records.io import PathLike

_PUBLISHED = ("win_rate", "standard_error", "discrete_win_rate")
_COUNTS = {"n_wins": "wins", "n_wins_base": "losses", "n_draws": "ties", "n_total": "n"}


@dataclass(frozen=True)
class Reproduction:
    """One published run: what we compute from its judgements, and what was published (column -> value)."""

    annotator: str
    run: str
    ours: WinRate
    published: dict[str, float]

    @property
    def gap(self) -> float:
        """The largest absolute difference over win rate, standard error and discrete win rate (percentage points)."""
        return max(abs(getattr(self.ours, name) - self.published[name]) for name in _PUBLISHED)

    @property
    def counts_equal(self) -> bool:
        """Whether wins, losses, ties and the total are the published ones."""
        return all(getattr(self.ours, ours) == self.published[name] for name, ours in _COUNTS.items())


def read_preferences(root: PathLike) -> dict[tuple[str, str], list[float | None]]:
    """Preference codes per (annotator, run), in the order of AlpacaEval's instructions.

    Some runs were published with every row twice; an index counts once.

    Raises:
      DataError: a missing or malformed file, or one index with two different preferences.
    """
    path = epath.Path(root) / "alpaca_eval" / "judgements.jsonl.gz"
    runs: dict[tuple[str, str], dict[int, float | None]] = defaultdict(dict)
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            key, index, code = (row["annotator"], row["run"]), row["index"], row["preference"]
        except KeyError as error:
            raise DataError(f"{path}, line {number}: the field {error} is missing") from error
        if runs[key].setdefault(index, code) != code:
            raise DataError(f"{path}, line {number}: index {index} of {key} has two different preferences")
    return {key: [codes[index] for index in sorted(codes)] for key, codes in runs.items()}


def read_leaderboards(root: PathLike) -> dict[tuple[str, str], dict[str, float]]:
    """The numeric columns of every `leaderboard_<annotator>.csv`, per (annotator, run).

    Raises:
      DataError: no leaderboard in the folder.
    """
    folder = epath.Path(root) / "alpaca_eval"
    boards: dict[tuple[str, str], dict[str, float]] = {}
    for path in sorted(folder.glob("leaderboard_*.csv")):
        annotator = path.name.removeprefix("leaderboard_").removesuffix(".csv")
        for row in csv.DictReader(path.read_text().splitlines()):
            run = row.pop("")
            boards[annotator, run] = {name: float(text) for name, text in row.items() if _is_number(text)}
    if not boards:
        raise DataError(
            f"{folder}: no `leaderboard_*.csv` there. Check the data folder (data.root or LAIF_DATA)."
        )
    return boards


def reproduce(root: PathLike) -> list[Reproduction]:
    """Recomputes every published run's win rate and standard error from its judgements.

    Raises:
      DataError: a published run without judgements.
    """
    preferences, boards = read_preferences(root), read_leaderboards(root)
    if missing := [key for key in boards if key not in preferences]:
        raise DataError(f"{root}: published runs without judgements: {missing}")
    return [
        Reproduction(*key, ours=win_rate(p_from_preferences(preferences[key])), published=published)
        for key, published in boards.items()
    ]


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
