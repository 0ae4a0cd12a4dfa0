"""launch/vertex.py: the request of a custom job, by hand and as Google's own message, and what the service is sent."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.launch.pod import ROOT
from tests.studies import tiny

SCRIPT = ROOT / "launch" / "vertex.py"
PLACE = ["--project", "p", "--region", "us-west4"]
JOB = [
    *PLACE,
    "--name",
    "study",
    "--image",
    "registry/laif:1",
    "--bucket",
    "gs://b/",
    "--service-account",
    "a@b",
]
TPU = [*JOB, "--tpu", "v5e", "--topology", "4x4"]
GPU = [*JOB, "--gpu", "NVIDIA_H100_80GB", "--machine-type", "a3-highgpu-8g"]
COMMAND = ["--", "run", "configs/x.yaml", "sft.epochs=3"]


def vertex(*arguments, code=0, python=sys.executable, **environment):
    done = subprocess.run(
        [python, str(SCRIPT), *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


def request(*arguments):
    return json.loads(vertex("submit", "--dry-run", *arguments).stdout)


# ---- the request, without Google's packages --------------------------------------------------------------------


def test_a_slice_is_one_replica_and_its_command_is_started_again():
    job = request(*TPU, "--spot", *COMMAND)
    spec = job["job_spec"]
    (pool,) = spec["worker_pool_specs"]
    assert pool["machine_spec"] == {"machine_type": "ct5lp-hightpu-4t", "tpu_topology": "4x4"}
    assert pool["replica_count"] == 1
    assert pool["container_spec"]["command"] == ["bash", "launch/again.sh", "laif"]
    assert pool["container_spec"]["args"] == [*COMMAND[1:], "out=gs://b/study/logs"]
    assert spec["base_output_directory"] == {"output_uri_prefix": "gs://b/study"}
    assert spec["scheduling"]["strategy"] == "SPOT"
    assert spec["scheduling"]["restart_job_on_worker_restart"] is True
    assert spec["service_account"] == "a@b"
    assert not {"tensorboard", "experiment", "network"} & set(spec)


@pytest.mark.parametrize(
    ("tpu", "topology", "machine"),
    [
        ("v5e", "1x1", "ct5lp-hightpu-1t"),
        ("v5e", "2x2", "ct5lp-hightpu-4t"),
        ("v5e", "2x4", "ct5lp-hightpu-8t"),
        ("v5e", "16x16", "ct5lp-hightpu-4t"),
        ("v6e", "4x8", "ct6e-standard-4t"),
    ],
)
def test_the_machine_of_a_topology(tpu, topology, machine):
    job = request(*TPU, "--tpu", tpu, "--topology", topology, *COMMAND)
    assert job["job_spec"]["worker_pool_specs"][0]["machine_spec"]["machine_type"] == machine


def test_gpu_nodes_are_a_pool_of_one_and_a_pool_of_the_rest():
    first, rest = request(*GPU, "--nodes", "4", *COMMAND)["job_spec"]["worker_pool_specs"]
    assert (first["replica_count"], rest["replica_count"]) == (1, 3)
    assert first["machine_spec"] == rest["machine_spec"]
    assert first["machine_spec"]["accelerator_count"] == 8
    assert len(request(*GPU, *COMMAND)["job_spec"]["worker_pool_specs"]) == 1


def test_an_output_folder_of_ones_own_stays():
    (pool,) = request(*TPU, *COMMAND, "out=gs://other/x")["job_spec"]["worker_pool_specs"]
    assert [a for a in pool["container_spec"]["args"] if a.startswith("out=")] == ["out=gs://other/x"]


def test_tensorboard_and_experiment():
    board = "projects/p/locations/us-west4/tensorboards/123"
    assert request(*TPU, "--tensorboard", "123", *COMMAND)["job_spec"]["tensorboard"] == board
    assert request(*TPU, "--tensorboard", board, *COMMAND)["job_spec"]["tensorboard"] == board
    spec = request(*TPU, "--tensorboard", "123", "--experiment", "e", "--run", "r", *COMMAND)["job_spec"]
    contexts = "projects/p/locations/us-west4/metadataStores/default/contexts"
    assert (spec["experiment"], spec["experiment_run"]) == (f"{contexts}/e", f"{contexts}/e-r")
    assert "tensorboard" not in spec, "the service refuses both; the experiment has it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TPU], "no command"),
        ([*PLACE, "--name", "study", *COMMAND], "no --image"),
        ([*TPU, "--name", "My Study", *COMMAND], "lower-case"),
        ([*TPU, "--bucket", "gs://", *COMMAND], "no --bucket"),
        ([*JOB, *COMMAND], "one of --tpu VERSION and --gpu TYPE"),
        ([*JOB, "--gpu", "NVIDIA_L4", *COMMAND], "--gpu needs --machine-type"),
        ([*TPU, "--topology", "2x2x2", *COMMAND], "v5e wants one as 4x4"),
        ([*TPU, "--topology", "3x5", *COMMAND], "no multiple of 4"),
        ([*TPU, "--tensorboard", "mine", *COMMAND], "give its number"),
        (
            [*TPU, "--tensorboard", "projects/p/locations/us-east1/tensorboards/1", *COMMAND],
            "must be in one region",
        ),
        ([*TPU, "--service-account", "", "--tensorboard", "1", *COMMAND], "need --service-account"),
        ([*TPU, "--env", "A", *COMMAND], "NAME=value"),
        ([*TPU, "--env", "HF_TOKEN=x", *COMMAND], "everybody who sees the job would see it"),
    ],
)
def test_a_mistake_is_told(arguments, message):
    assert message in vertex("submit", "--dry-run", *arguments, code=2).stderr


def test_without_googles_packages_it_says_how_to_start_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['google.cloud.aiplatform_v1'] = None\n"
    )
    done = vertex("status", *PLACE, "--job", "1", code=2, PYTHONPATH=str(tmp_path))
    assert "uv run launch/vertex.py" in done.stderr


def test_a_job_must_be_named_by_its_number():
    assert "no --job NUMBER" in vertex("status", *PLACE, code=2).stderr


def test_the_numbers_of_a_study():
    path = tiny.finished() / "runs" / "tiny" / "results.json"
    arms = json.loads(path.read_text())["arms"]
    out = vertex("results", *PLACE, "--dry-run", "--experiment", "e", "--results", str(path)).stdout
    numbers = json.loads(out)
    assert len(arms) >= 3
    for name, arm in arms.items():
        assert numbers[f"win_rate/{name}"] == arm["win_rate"]
    assert any(name.startswith("delta/") and "LAIF" in name for name in numbers)
    assert all(isinstance(number, float) for number in numbers.values())


# ---- with Google's packages, without the network ---------------------------------------------------------------


# Google's own messages refuse a field or a value that they do not know.
READ = """
import json, sys
from google.cloud import aiplatform_v1
jobs = [aiplatform_v1.CustomJob(job) for job in json.load(sys.stdin)]
print(json.dumps([aiplatform_v1.CustomJob.to_dict(job, use_integers_for_enums=False) for job in jobs]))
"""

# The real client against a server on this machine.
SEND = """
import sys
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform_v1
from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceRestTransport
sys.path.insert(0, sys.argv[1])
import vertex
transport = JobServiceRestTransport(host=sys.argv[2], url_scheme="http", credentials=AnonymousCredentials())
client = aiplatform_v1.JobServiceClient(transport=transport)
cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
options = vertex.parser().parse_args(sys.argv[3:cut])
options.command = sys.argv[cut + 1 :]
sys.exit(getattr(vertex, options.verb)(options, client=lambda options: client))
"""


def test_googles_messages_take_every_field():
    asked = [
        request(
            *TPU,
            "--spot",
            "--tensorboard",
            "1",
            "--network",
            "projects/1/global/networks/n",
            "--shell",
            *COMMAND,
        ),
        request(*TPU, "--experiment", "e", "--env", "A=b", *COMMAND),
        request(*GPU, "--nodes", "2", "--strategy", "FLEX_START", "--wait-hours", "0", *COMMAND),
    ]
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps(asked), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spot, tracked, gpu = json.loads(done.stdout)
    assert spot["job_spec"]["scheduling"]["strategy"] == "SPOT"
    assert spot["job_spec"]["tensorboard"].endswith("/tensorboards/1")
    assert spot["job_spec"]["enable_web_access"] is True
    assert tracked["job_spec"]["experiment_run"].endswith("/e-study")
    assert tracked["job_spec"]["worker_pool_specs"][0]["container_spec"]["env"] == [
        {"name": "A", "value": "b"}
    ]
    assert gpu["job_spec"]["worker_pool_specs"][1]["machine_spec"]["accelerator_type"] == "NVIDIA_H100_80GB"
    assert gpu["job_spec"]["scheduling"]["timeout"] == "604800s"


class Service(BaseHTTPRequestHandler):
    """Vertex AI's job service, as far as a job goes."""

    seen: list[tuple[str, str, dict]]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        self.seen.append(("POST", self.path.partition("?")[0], body))
        self._answer({"name": "projects/1/locations/us-west4/customJobs/77", "state": "JOB_STATE_PENDING"})

    def do_GET(self):
        self.seen.append(("GET", self.path.partition("?")[0], {}))
        self._answer(
            {"displayName": "study", "state": "JOB_STATE_FAILED", "error": {"message": "exit code 2"}}
        )

    def _answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        """Quiet."""


def test_the_real_client_sends_the_job():
    seen: list[tuple[str, str, dict]] = []
    server = HTTPServer(("127.0.0.1", 0), type("Recording", (Service,), {"seen": seen}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"

    def send(*arguments):
        command = [sys.executable, "-c", SEND, str(Path(SCRIPT).parent), address, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    try:
        done = send("submit", *TPU, "--spot", *COMMAND)
        assert done.returncode == 0, done.stderr
        assert "job 77: JOB_STATE_PENDING" in done.stdout
        assert "training/77?project=p" in done.stdout
        method, path, body = seen.pop()
        assert (method, path) == ("POST", "/v1/projects/p/locations/us-west4/customJobs")
        assert body["displayName"] == "study"
        pool = body["jobSpec"]["workerPoolSpecs"][0]
        assert pool["machineSpec"] == {"machineType": "ct5lp-hightpu-4t", "tpuTopology": "4x4"}
        assert body["jobSpec"]["scheduling"]["restartJobOnWorkerRestart"] is True
        done = send("status", *PLACE, "--job", "77")
        assert (done.returncode, done.stdout) == (1, "study: JOB_STATE_FAILED: exit code 2\n")
        assert seen.pop()[:2] == ("GET", "/v1/projects/p/locations/us-west4/customJobs/77")
        assert send("cancel", *PLACE, "--job", "77").returncode == 0
        assert seen.pop()[1] == "/v1/projects/p/locations/us-west4/customJobs/77:cancel"
    finally:
        server.shutdown()
        server.server_close()


def test_the_tracking_calls_exist_as_they_are_used():
    """`init`, `start_run`, `log_params`, `log_metrics` of the installed version take what is passed."""
    code = (
        "import inspect\nfrom google.cloud import aiplatform\n"
        "place = dict(project='p', location='l', experiment='e', experiment_tensorboard='t')\n"
        "inspect.signature(aiplatform.init).bind(**place)\n"
        "inspect.signature(aiplatform.start_run).bind('r', resume=True)\n"
        "inspect.signature(aiplatform.log_params).bind({'a': 'b'})\n"
        "inspect.signature(aiplatform.log_metrics).bind({'a': 1.0})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
