"""Our numbers from AlpacaEval's published judgements equal the published ones."""

import gzip
import json
import os

import pytest

from laif_jax.evaluation.alpaca_eval import read_preferences, reproduce
from laif_jax.records import DataError

DATA = os.environ.get("LAIF_DATA")


@pytest.mark.real
@pytest.mark.skipif(DATA is None, reason="LAIF_DATA is not set: the published judgements are not here")
def test_all_published_runs():
    runs = reproduce(str(DATA))
    assert len(runs) == 36
    wrong = [
        (run.annotator, run.run, run.gap, run.counts_equal)
        for run in runs
        if run.gap > 1e-9 or not run.counts_equal
    ]
    assert not wrong


def _write(root, rows, board):
    folder = root / "alpaca_eval"
    folder.mkdir()
    with gzip.open(folder / "judgements.jsonl.gz", "wt", encoding="utf-8") as file:
        for index, code in rows:
            row = {"annotator": "judge", "run": "m", "index": index, "preference": code}
            file.write(json.dumps(row) + "\n")
    if board:
        (folder / "leaderboard_judge.csv").write_text(board)


COLUMNS = ",win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,mode,discrete_win_rate\n"


def test_small_leaderboard(tmp_path):
    """Codes 0 and null, rows published twice, columns of text."""
    rows = [(0, 2), (1, 1), (2, 0), (3, None), (4, 2)]
    _write(tmp_path, rows + rows, COLUMNS + "m,62.5,23.935677693908453,2,1,1,4,minimal,62.5\n")
    (run,) = reproduce(tmp_path)
    assert run.gap < 1e-9
    assert run.counts_equal


def test_contradiction_and_absence(tmp_path):
    _write(tmp_path, [(0, 2), (0, 1)], "")
    with pytest.raises(DataError, match="two different preferences"):
        read_preferences(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(DataError, match="no such file"):
        reproduce(other)
    _write(other, [(0, 2)], "")
    with pytest.raises(DataError, match=r"leaderboard_\*\.csv"):
        reproduce(other)


def test_published_run_without_judgements(tmp_path):
    _write(tmp_path, [(0, 2), (1, 1)], COLUMNS + "else,50,0,1,1,0,2,minimal,50\n")
    with pytest.raises(DataError, match="without judgements"):
        reproduce(tmp_path)
