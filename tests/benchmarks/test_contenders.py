"""What contenders decide by themselves, and which take part."""

import sys
from pathlib import Path

import pytest

from benchmarks.contenders import OURS, PEERS, find_peer, scripts
from benchmarks.run import TASKS

PEER_FOLDER = Path(__file__).parent.parent.parent / "benchmarks" / "peers"


def test_each_task_of_a_peer_is_of_the_release_that_has_it():
    ppo, sft = find_peer("trl", "ppo"), find_peer("trl", "sft")
    assert ppo is not None
    assert sft is not None
    assert ppo.packages[0] == "trl==1.12.0"  # later releases have no PPO
    assert ppo.folder != sft.folder
    assert find_peer("tunix", "ppo") is None
    for releases in PEERS.values():
        for peer in releases:
            assert set(peer.tasks) <= set(TASKS)
            assert (PEER_FOLDER / peer.script).exists()


def test_an_environment_that_is_there_is_used(tmp_path):
    python = tmp_path / "trl-ppo" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    found = scripts("ppo", ["trl", "tunix"], tmp_path)
    assert list(found) == [OURS, "trl"]
    assert found["trl"] == (python, PEER_FOLDER / "trl_ppo.py")
    assert found[OURS] == (Path(sys.executable), PEER_FOLDER / "laif_ppo.py")


@pytest.mark.parametrize(("rows", "length", "found"), [(8, 128, 8), (6, 400, 2), (3, 1200, 1), (4, 8, 4)])
def test_rows_of_a_forward_pass_divide_the_minibatch(rows, length, found, monkeypatch):
    monkeypatch.syspath_prepend(str(PEER_FOLDER))
    from laif_ppo import micro_batch

    assert micro_batch(rows, length) == found
