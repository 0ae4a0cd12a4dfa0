"""A whole study through launch/tpu_pod.sh: real JAX processes on the workers, of which the slice is taken away."""

import copy
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.pod import ROOT, Cloud
from tests.studies import tiny


def study(folder: Path, cache: Path, preempt: bool) -> tuple[Path, Cloud]:
    """Runs the tiny study on two workers with four simulated devices each; its folder in the bucket, and the service.

    `preempt`: as soon as DPO has a checkpoint, the slice is lost with all that is on its disks.
    """
    folder.mkdir()
    tree = copy.deepcopy(tiny.TREE) | {"out": str(folder / "bucket")}
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    cloud = Cloud(folder / "pod")
    cloud.set(address="127.0.0.1")
    own = [f"PYTHONPATH={ROOT}", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=4"]
    command = [
        "env",
        *own,
        f"LAIF_CACHE={cache}",
        sys.executable,
        "-m",
        "laif_jax.cli",
        "run",
        str(folder / "study.yaml"),
    ]
    watch = cloud.start("run", "--watch", "--poll", "1", "--", *command)
    try:
        deadline = time.monotonic() + 1200
        while watch.poll() is None:
            assert time.monotonic() < deadline
            if preempt and list((folder / "bucket").glob("tiny/dpo-*/train/checkpoints/2")):
                cloud.preempt()
                preempt = False
            time.sleep(0.1)
        out, err = watch.communicate()
        logs = [home / "laif-runs" / "study" / "log" for home in cloud.workers()]
        told = "".join(path.read_text()[-3000:] for path in logs if path.exists())
        assert watch.returncode == 0, out + err + told
    finally:
        watch.kill()
        watch.wait()
        cloud.end()
    assert not preempt, "DPO was done before it could be preempted"
    return folder / "bucket" / "tiny", cloud


def weights(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("*/model/*.safetensors"))
    }


@pytest.mark.slow
def test_a_preempted_study_ends_as_an_undisturbed_one(tmp_path):
    cache = Path(os.environ.get("LAIF_CACHE") or tmp_path / "cache")
    calm, cloud = study(tmp_path / "calm", cache, preempt=False)
    assert cloud.state["created"] == 1
    disturbed, cloud = study(tmp_path / "disturbed", cache, preempt=True)
    assert cloud.state["created"] == 2
    assert len(weights(calm)) >= 3
    assert weights(disturbed) == weights(calm)
    arms = [json.loads((run / "results.json").read_text())["arms"] for run in (calm, disturbed)]
    assert arms[0] == arms[1]
