"""The benchmark of the labelling engine runs and says what it promises; its figures are nobody's concern here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("client", ["simulated", "plain"])
def test_the_benchmark_ends_with_one_json_object(client: str, tmp_path: Path) -> None:
    options = ["--in-flight", "4", "16", "--one-core", "32", "--latency", "0.01", "--seconds", "0.2"]
    options += ["--rows", "300", "--folder", str(tmp_path), "--client", client, "--paid", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.labeling", *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"in_flight", "throughput", "bound", "ratio_to_bound", "open_seconds", "rss_mb"} <= set(found)
    assert (found["in_flight"], found["bound"], found["judgements"]) == (16, 1600.0, 320)
    assert found["one_core"]["in_flight"] == 32
    assert 0 < found["ratio_to_bound"] <= 1
    assert (found["stored"], found["left"]) == (300, {})
    assert list(tmp_path.iterdir()) == []
