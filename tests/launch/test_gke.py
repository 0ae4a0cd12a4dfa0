"""launch/gke: the JobSet manifests, and what kubectl is given."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.launch.pod import FAKES, ROOT

JOB = [sys.executable, str(ROOT / "launch" / "gke" / "job.py")]
TPU = ["--name", "study", "--image", "registry/laif:1", "--tpu", "v5e", "--topology", "4x4"]
GPU = ["--name", "study", "--image", "registry/laif:1", "--gpu", "nvidia-h100-80gb"]
COMMAND = ["--", "run", "configs/x.yaml", "out=gs://bucket/runs", "name=yes"]


def job(*arguments, code=0, **environment):
    done = subprocess.run(
        [*JOB, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


def rendered(*arguments):
    return yaml.safe_load(job("render", *arguments, *COMMAND).stdout)


def parts(manifest):
    """(replicated job, job's spec, pod's spec, container), after the checks that every manifest must pass."""
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    assert spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "Kubernetes refuses a podFailurePolicy with another"
    (container,) = pod["containers"]
    saved, disrupted = spec["podFailurePolicy"]["rules"]
    assert saved == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [75]},
    }
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    return replicated, spec, pod, container


@pytest.mark.parametrize("name", ["jobset_tpu.yaml", "jobset_gpu.yaml"])
def test_the_shipped_manifests_are_whole(name):
    parts(yaml.safe_load((ROOT / "launch" / "gke" / name).read_text()))


@pytest.mark.parametrize(
    ("tpu", "topology", "more", "hosts", "chips", "accelerator"),
    [
        ("v5e", "4x4", [], 4, 4, "tpu-v5-lite-podslice"),
        ("v5e", "16x16", [], 64, 4, "tpu-v5-lite-podslice"),
        ("v5e", "2x4", ["--chips-per-host", "8"], 1, 8, "tpu-v5-lite-podslice"),
        ("v6e", "1x1", [], 1, 1, "tpu-v6e-slice"),
        ("v5p", "2x2x4", [], 4, 4, "tpu-v5p-slice"),
        ("v4", "2x2x1", [], 1, 4, "tpu-v4-podslice"),
    ],
)
def test_a_slice_has_the_hosts_of_its_topology(tpu, topology, more, hosts, chips, accelerator):
    _, spec, pod, container = parts(rendered(*TPU, "--tpu", tpu, "--topology", topology, *more))
    assert spec["parallelism"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }


def test_everything_that_can_be_said_of_slices():
    more = [
        "--slices",
        "2",
        "--spot",
        "--namespace",
        "team",
        "--queue",
        "q",
        "--secret",
        "keys",
        "--env",
        "A=b=c",
    ]
    manifest = rendered(*TPU, *more, "--restarts", "7", "--service-account", "sa")
    replicated, _, pod, container = parts(manifest)
    assert replicated["replicas"] == 2
    assert manifest["metadata"]["name"] == "study"
    assert manifest["metadata"]["namespace"] == "team"
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    exclusive = manifest["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["serviceAccountName"] == "sa"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert container["args"] == COMMAND[1:], "`yes` stays a text"
    assert container["env"] == [{"name": "A", "value": "b=c"}]
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_gpu_nodes_learn_their_places():
    manifest = rendered(*GPU, "--nodes", "4", "--gpus-per-node", "4", "--reservation", "r")
    _, spec, pod, container = parts(manifest)
    assert spec["parallelism"] == 4
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "r"
    places = {item["name"]: item.get("value") for item in container["env"]}
    assert places["JAX_COORDINATOR_ADDRESS"] == "study-node-0-0.study:8482"
    assert places["JAX_NUM_PROCESSES"] == "4"
    path = container["env"][2]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    network = manifest["spec"]["network"]
    assert (network["enableDNSHostnames"], network["subdomain"]) == (True, "study"), (
        "the name of the coordinator"
    )


@pytest.fixture
def kubectl(tmp_path):
    """job.py with a kubectl that records, and what it recorded."""

    def run(*arguments, code=0, **environment):
        path = f"{FAKES}:{os.environ['PATH']}"
        return job(*arguments, code=code, PATH=path, FAKE_CLUSTER=str(tmp_path), **environment)

    run.calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    run.manifest = lambda: yaml.safe_load((tmp_path / "manifest.yaml").read_text())
    return run


def test_create_gives_kubectl_the_manifest(kubectl):
    kubectl("create", *TPU, "--namespace", "team", "--context", "c", *COMMAND)
    assert kubectl.calls() == ["kubectl --context=c --namespace=team create --filename=-"]
    assert kubectl.manifest() == rendered(*TPU, "--namespace", "team")


def test_status_logs_and_stop(kubectl):
    name = ["--name", "study"]
    kubectl("status", *name)
    kubectl("logs", *name, "--slice", "1", "--worker", "3", "--follow")
    kubectl("stop", *name)
    selector = "--selector=jobset.sigs.k8s.io/jobset-name=study"
    assert kubectl.calls() == [
        "kubectl --namespace=default get jobset study",
        f"kubectl --namespace=default get pods {selector} --output=wide",
        f"kubectl --namespace=default logs {selector},jobset.sigs.k8s.io/job-index=1,"
        "batch.kubernetes.io/job-completion-index=3 --container=laif --tail=200 --follow",
        "kubectl --namespace=default delete jobset study",
    ]


def test_kubectls_failure_is_ours(kubectl):
    kubectl("create", *TPU, *COMMAND, code=3, FAKE_KUBECTL="3")


def test_a_dry_run_prints_the_manifest_and_the_command(kubectl):
    out = kubectl("create", "--dry-run", *TPU, *COMMAND).stdout
    assert kubectl.calls() == []
    assert yaml.safe_load(out) == rendered(*TPU), "the command is a comment below it"
    assert out.splitlines()[-1] == "# kubectl --namespace=default create --filename=-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TPU], "no command"),
        (["--name", "study", *COMMAND], "no --image"),
        (["--name", "study", "--image", "i", *COMMAND], "give one of --tpu"),
        ([*TPU, "--gpu", "g", *COMMAND], "give one of --tpu"),
        (["--name", "study", "--image", "i", "--tpu", "v5e", *COMMAND], "--tpu needs --topology"),
        ([*TPU, "--topology", "4x4x4", *COMMAND], "v5e has 2 dimensions, as in 4x4"),
        ([*TPU, "--topology", "3x3", *COMMAND], "9 chips are no multiple of 4"),
        ([*TPU, "--topology", "2x2", "--slices", "2", *COMMAND], "only slices of several hosts"),
        ([*TPU, "--spot", "--reservation", "r", *COMMAND], "one of --spot and --reservation"),
        ([*TPU, "--env", "KEY", *COMMAND], "NAME=value"),
        ([*TPU, "--name", "My Study", *COMMAND], "lower-case"),
    ],
)
def test_a_mistake_is_told_before_kubectl_is_called(kubectl, arguments, message):
    assert message in kubectl("create", *arguments, code=2).stderr
    assert kubectl.calls() == []
