#!/usr/bin/env python3
# ruff: noqa: T201 (what a script prints is its result)
# /// script
# requires-python = ">=3.11"
# dependencies = ["google-cloud-aiplatform>=2.7"]
# ///
"""A training run as a custom job of Vertex AI, with its TensorBoard and its experiment tracking.

    uv run launch/vertex.py submit --project P --region us-west4 --name study --image IMAGE --bucket gs://BUCKET \
        --service-account laif-worker@P.iam.gserviceaccount.com --tpu v5e --topology 4x4 --spot \
        --tensorboard projects/P/locations/us-west4/tensorboards/ID --experiment laif-studies \
        -- run configs/study.yaml
    uv run launch/vertex.py status|cancel --project P --region us-west4 --job NUMBER
    uv run launch/vertex.py results --project P --region us-west4 --experiment laif-studies --run study \
        --results gs://BUCKET/study/logs/study/results.json

Behind `--` stands what `laif` is to do. The run is written to gs://BUCKET/NAME/logs, the folder that Vertex AI's
TensorBoard reads; a job of the same name goes on where the last one stopped. `--dry-run` prints the request as JSON; it
needs neither an account nor the packages. uv makes an environment for it; one with the `gcp` extra of laif_jax has the
packages too.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# TPU version -> (machine type by chips of a host, dimensions of a topology). Slices of several hosts have 4 chips each.
# https://cloud.google.com/vertex-ai/docs/training/training-with-tpu-vm
TPUS: dict[str, tuple[dict[int, str], int]] = {
    "v5e": ({1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"}, 2),
    "v6e": ({1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"}, 2),
}
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
Request = dict[str, Any]


class UsageError(Exception):
    """A mistake in what was asked; shown as one line."""


# ---- the request -----------------------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> tuple[Request, int]:
    """(machine spec, replicas) of the accelerators that were asked for."""
    if (options.tpu is None) == (options.gpu is None):
        raise UsageError("give one of --tpu VERSION and --gpu TYPE")
    if options.gpu:
        if not options.machine_type:
            raise UsageError("--gpu needs --machine-type, for example a3-highgpu-8g")
        spec = {"machine_type": options.machine_type, "accelerator_type": options.gpu}
        return spec | {"accelerator_count": options.gpus_per_node}, options.nodes
    machines, dimensions = TPUS[options.tpu]
    if not re.fullmatch(r"\d+" + r"x\d+" * (dimensions - 1), options.topology or ""):
        raise UsageError(
            f"--topology {options.topology}: {options.tpu} wants one as {'x'.join(['4'] * dimensions)}"
        )
    chips = 1
    for size in options.topology.split("x"):
        chips *= int(size)
    if chips > 8 and chips % 4:
        raise UsageError(f"--topology {options.topology}: {chips} chips are no multiple of 4 per host")
    # One slice is one replica, whatever number of hosts it has.
    return {"machine_type": machines.get(chips, machines[4]), "tpu_topology": options.topology}, 1


def pools(options: argparse.Namespace) -> list[Request]:
    """The worker pools: the first has one replica, as Vertex AI wants it, and the second the rest."""
    spec, replicas = machine(options)
    environment = []
    for text in options.env:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env {text}: write it as NAME=value")
        if SECRET.search(name):
            raise UsageError(
                f"--env {name}: everybody who sees the job would see it; the run can read a file in its bucket"
            )
        environment.append({"name": name, "value": value})
    folder = f"out=gs://{_bucket(options)}/{options.name}/logs"
    arguments = options.command + ([] if any(c.startswith("out=") for c in options.command) else [folder])
    pool = {
        "machine_spec": spec,
        "replica_count": 1,
        "container_spec": {
            "image_uri": options.image,
            "command": [
                "bash",
                "launch/again.sh",
                "laif",
            ],  # hears "start me again", which here would be a failure
            "args": arguments,
            "env": environment,
        },
        "disk_spec": {"boot_disk_type": options.disk_type, "boot_disk_size_gb": options.disk_gb},
    }
    return [pool] if replicas == 1 else [pool, pool | {"replica_count": replicas - 1}]


def _bucket(options: argparse.Namespace) -> str:
    bucket = (options.bucket or "").removeprefix("gs://").strip("/")
    if not bucket:
        raise UsageError("no --bucket: the run and its checkpoints are written to gs://BUCKET/NAME")
    return bucket


def custom_job(options: argparse.Namespace) -> Request:
    """The fields of `google.cloud.aiplatform_v1.CustomJob`. Raises UsageError."""
    if not options.command:
        raise UsageError(
            "no command: behind -- stands what laif is to do, for example: -- run configs/quickstart.yaml"
        )
    if not options.image:
        raise UsageError("no --image: build launch/Containerfile and push it to the project's registry")
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}", options.name or ""):
        raise UsageError(
            f"--name {options.name}: lower-case letters, digits and -, at most 63, a letter first"
        )
    if (options.tensorboard or options.experiment) and not options.service_account:
        raise UsageError("--tensorboard and --experiment need --service-account: it writes to them")
    spec: Request = {
        "worker_pool_specs": pools(options),
        "base_output_directory": {"output_uri_prefix": f"gs://{_bucket(options)}/{options.name}"},
        "scheduling": {
            # A lost host ends the others: all start again, and go on from their checkpoints.
            "restart_job_on_worker_restart": True,
            "timeout": {"seconds": options.days * 86400},
            "strategy": options.strategy,
        },
    }
    if options.strategy == "FLEX_START":
        spec["scheduling"]["max_wait_duration"] = {"seconds": options.wait_hours * 3600}
    if options.service_account:
        spec["service_account"] = options.service_account
    if options.network:
        spec["network"] = options.network
    if options.shell:
        spec["enable_web_access"] = True
    if options.experiment:
        # The experiment has the TensorBoard; the service refuses a job that names both.
        store = f"projects/{options.project}/locations/{options.region}/metadataStores/default/contexts"
        spec["experiment"] = f"{store}/{options.experiment}"
        spec["experiment_run"] = f"{store}/{options.experiment}-{_run_name(options)}"
    elif options.tensorboard:
        spec["tensorboard"] = _tensorboard(options)
    return {"display_name": options.name, "job_spec": spec, "labels": {"app": "laif", "study": options.name}}


def _tensorboard(options: argparse.Namespace) -> str:
    full = re.fullmatch(r"projects/[^/]+/locations/([^/]+)/tensorboards/\d+", options.tensorboard)
    if full and full[1] != options.region:
        raise UsageError(
            f"--tensorboard is in {full[1]}, the job in {options.region}: they must be in one region"
        )
    if not full and not options.tensorboard.isdigit():
        raise UsageError(
            f"--tensorboard {options.tensorboard}: give its number, or its full name in {options.region}, "
            f"projects/P/locations/{options.region}/tensorboards/NUMBER"
        )
    if full:
        return options.tensorboard
    return f"projects/{options.project}/locations/{options.region}/tensorboards/{options.tensorboard}"


def _run_name(options: argparse.Namespace) -> str:
    return options.run or options.name


# ---- verbs -----------------------------------------------------------------------------------------------------


def _client(options: argparse.Namespace) -> Any:
    """The service's client for the region."""
    from google.cloud import aiplatform_v1

    return aiplatform_v1.JobServiceClient(
        client_options={"api_endpoint": f"{options.region}-aiplatform.googleapis.com"}
    )


def _tracking(options: argparse.Namespace) -> Any:
    """`google.cloud.aiplatform`, with the experiment (made if it is not there) and its TensorBoard in force."""
    from google.cloud import aiplatform

    board = {"experiment_tensorboard": _tensorboard(options)} if options.tensorboard else {}
    aiplatform.init(project=options.project, location=options.region, experiment=options.experiment, **board)
    return aiplatform


def submit(options: argparse.Namespace, client: Callable[[argparse.Namespace], Any] = _client) -> int:
    """Creates the job; with an experiment first the run in it, with what was asked for as its parameters."""
    job = custom_job(options)
    if options.dry_run:
        print(json.dumps(job, indent=1))
        return 0
    from google.cloud import aiplatform_v1

    if options.experiment:
        aiplatform = _tracking(options)
        aiplatform.start_run(_run_name(options), resume=options.resume_run)
        aiplatform.log_params(parameters(options))
    created = client(options).create_custom_job(
        parent=f"projects/{options.project}/locations/{options.region}",
        custom_job=aiplatform_v1.CustomJob(job),
    )
    number = created.name.rsplit("/", 1)[-1]
    print(f"job {number}: {created.state.name}")
    print(
        f"https://console.cloud.google.com/vertex-ai/locations/{options.region}/training/{number}?project={options.project}"
    )
    return 0


def parameters(options: argparse.Namespace) -> dict[str, str]:
    """What an experiment run is told about the job: the command, its overrides one by one, and the machines."""
    spec, replicas = machine(options)
    overrides = dict(word.split("=", 1) for word in options.command if "=" in word)
    told = {
        "command": " ".join(options.command),
        "image": options.image,
        "machine_type": spec["machine_type"],
    }
    told |= {"accelerators": options.topology or f"{replicas} x {options.gpus_per_node} {options.gpu}"}
    return told | overrides


def status(options: argparse.Namespace, client: Callable[[argparse.Namespace], Any] = _client) -> int:
    """Prints the job's state; 1 if it failed."""
    name = _job(options)
    job = client(options).get_custom_job(name=name)
    print(f"{job.display_name}: {job.state.name}" + (f": {job.error.message}" if job.error.message else ""))
    return int(job.state.name in ("JOB_STATE_FAILED", "JOB_STATE_EXPIRED"))


def cancel(options: argparse.Namespace, client: Callable[[argparse.Namespace], Any] = _client) -> int:
    """Asks for the job's end; its processes get SIGTERM."""
    name = _job(options)
    client(options).cancel_custom_job(name=name)
    return 0


def _job(options: argparse.Namespace) -> str:
    if not (options.job or "").isdigit():
        raise UsageError("no --job NUMBER, as submit printed it")
    return f"projects/{options.project}/locations/{options.region}/customJobs/{options.job}"


def results(options: argparse.Namespace) -> int:
    """Writes a finished study's numbers into its experiment run."""
    if not options.experiment or not options.results:
        raise UsageError("results needs --experiment, --run and --results (a results.json, local or gs://)")
    numbers = metrics(json.loads(_read(options.results)))
    if options.dry_run:
        print(json.dumps(numbers, indent=1))
        return 0
    aiplatform = _tracking(options)
    with aiplatform.start_run(_run_name(options), resume=True):
        aiplatform.log_metrics(numbers)
    return 0


def metrics(study: dict[str, Any]) -> dict[str, float]:
    """Win rate, standard error and length of every arm, and the differences between arms."""
    found: dict[str, float] = {}
    for name, arm in study["arms"].items():
        for key in ("win_rate", "standard_error", "mean_length"):
            if arm.get(key) is not None:
                found[f"{key}/{name}"] = float(arm[key])
    for pair in study.get("comparisons", ()):
        found[f"delta/{pair['a']} - {pair['b']}"] = float(pair["delta"])
    return found


def _read(path: str) -> str:
    if not path.startswith("gs://"):
        return Path(path).read_text()
    from google.cloud import storage

    bucket, _, name = path.removeprefix("gs://").partition("/")
    return storage.Client().bucket(bucket).blob(name).download_as_text()


# ---- command line ----------------------------------------------------------------------------------------------

VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "submit": submit,
    "status": status,
    "cancel": cancel,
    "results": results,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("verb", choices=sorted(VERBS))
    made.add_argument("--project", required=True)
    made.add_argument("--region", required=True)
    made.add_argument("--dry-run", action="store_true", help="print the request in place of sending it")
    made.add_argument("--job", help="number of a job (status, cancel)")
    made.add_argument("--experiment", help="of Vertex AI Experiments; made if it is not there")
    made.add_argument("--run", help="the experiment run's name (default: --name)")
    made.add_argument("--resume-run", action="store_true", help="the experiment run exists already")
    made.add_argument("--tensorboard", help="a Vertex AI TensorBoard: its number, or its full name")
    made.add_argument("--results", help="a study's results.json (results)")
    job = made.add_argument_group("submit")
    job.add_argument("--name")
    job.add_argument("--image", help="built from launch/Containerfile")
    job.add_argument("--bucket", help="the run is written to gs://BUCKET/NAME/logs")
    job.add_argument("--service-account")
    job.add_argument("--tpu", choices=sorted(TPUS))
    job.add_argument("--topology", help="for example 4x4")
    job.add_argument("--gpu", help="an accelerator type of Vertex AI, for example NVIDIA_H100_80GB")
    job.add_argument("--machine-type", help="with --gpu")
    job.add_argument("--gpus-per-node", type=int, default=8)
    job.add_argument("--nodes", type=int, default=1)
    strategies = ("STANDARD", "SPOT", "FLEX_START")
    job.add_argument("--strategy", choices=strategies, default="STANDARD", help="how capacity is asked for")
    job.add_argument("--spot", dest="strategy", action="store_const", const="SPOT")
    job.add_argument("--wait-hours", type=int, default=24, help="with FLEX_START; 0: without an end")
    job.add_argument("--days", type=int, default=7, help="the job's longest time")
    job.add_argument("--network", help="projects/NUMBER/global/networks/NAME, to reach a labelling service")
    job.add_argument("--env", action="append", default=[], metavar="NAME=value")
    job.add_argument("--disk-gb", type=int, default=200)
    job.add_argument("--disk-type", default="pd-ssd")
    job.add_argument("--shell", action="store_true", help="interactive shells into the containers")
    return made


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 the job failed, 2 a mistake in what was asked."""
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_args(arguments[:cut])
    options.command = arguments[cut + 1 :]
    try:
        return VERBS[options.verb](options)
    except UsageError as error:
        print(f"vertex: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"vertex: {error}. Start it with: uv run launch/vertex.py", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
