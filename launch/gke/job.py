#!/usr/bin/env python3
"""A training run on a GKE cluster: fills in the JobSet manifest beside this file and hands it to kubectl.

    python launch/gke/job.py create --name study --image IMAGE --tpu v5e --topology 4x4 --slices 2 --spot \
        -- run configs/study.yaml out=gs://BUCKET/runs
    python launch/gke/job.py create --name study --image IMAGE --gpu nvidia-h100-80gb --nodes 2 -- run ...
    python launch/gke/job.py status|logs|stop --name study

`--dry-run` prints the manifest and the command. Behind `--` stands what `laif` is to do (the image's entry point).
"""

import argparse
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
# TPU version -> (value of cloud.google.com/gke-tpu-accelerator, dimensions of a topology).
TPUS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
}
CHIPS_PER_HOST = 4  # of every machine type that can be part of a slice of several hosts
NAME = re.compile(r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?")
Manifest = dict[str, Any]


class UsageError(Exception):
    """A mistake in what was asked; shown as one line."""


def hosts_of(tpu: str, topology: str, chips_per_host: int) -> int:
    """How many hosts a slice has. Raises UsageError for a topology that there cannot be."""
    dimensions = TPUS[tpu][1]
    if not re.fullmatch(r"\d+" + r"x\d+" * (dimensions - 1), topology):
        example = "x".join(["4"] * dimensions)
        raise UsageError(f"--topology {topology}: {tpu} has {dimensions} dimensions, as in {example}")
    chips = math.prod(int(size) for size in topology.split("x"))
    if chips > chips_per_host and chips % chips_per_host:
        raise UsageError(f"--topology {topology}: {chips} chips are no multiple of {chips_per_host} per host")
    return max(1, chips // chips_per_host)


def tpu_manifest(options: argparse.Namespace) -> Manifest:
    """The JobSet of a run on TPU slices."""
    manifest = yaml.safe_load((HERE / "jobset_tpu.yaml").read_text())
    per_host = options.chips_per_host or CHIPS_PER_HOST
    hosts = hosts_of(options.tpu, options.topology, per_host)
    chips = math.prod(int(size) for size in options.topology.split("x"))
    if options.slices > 1 and hosts == 1:
        raise UsageError(
            f"--slices {options.slices}: GKE joins only slices of several hosts; {options.topology} has one"
        )
    job = manifest["spec"]["replicatedJobs"][0]
    job["replicas"] = options.slices
    job["template"]["spec"] |= {"parallelism": hosts, "completions": hosts}
    pod = _fill(manifest, options)
    pod["nodeSelector"] = {
        "cloud.google.com/gke-tpu-accelerator": TPUS[options.tpu][0],
        "cloud.google.com/gke-tpu-topology": options.topology,
        **_capacity(options),
    }
    pod["containers"][0]["resources"]["limits"]["google.com/tpu"] = min(chips, per_host)
    return manifest


def gpu_manifest(options: argparse.Namespace) -> Manifest:
    """The JobSet of a run on GPU nodes."""
    manifest = yaml.safe_load((HERE / "jobset_gpu.yaml").read_text())
    manifest["spec"]["network"]["subdomain"] = options.name
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"] |= {
        "parallelism": options.nodes,
        "completions": options.nodes,
    }
    pod = _fill(manifest, options)
    container = pod["containers"][0]
    places = {
        "JAX_COORDINATOR_ADDRESS": f"{options.name}-node-0-0.{options.name}:8482",
        "JAX_NUM_PROCESSES": str(options.nodes),
    }
    for variable in container["env"]:
        if variable["name"] in places:
            variable["value"] = places[variable["name"]]
    pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": options.gpu, **_capacity(options)}
    container["resources"]["limits"]["nvidia.com/gpu"] = options.gpus_per_node
    return manifest


def _fill(manifest: Manifest, options: argparse.Namespace) -> Manifest:
    """What both kinds share; returns the pod's spec."""
    meta, spec = manifest["metadata"], manifest["spec"]
    meta |= {"name": options.name, "namespace": options.namespace}
    if options.queue:
        meta.setdefault("labels", {})["kueue.x-k8s.io/queue-name"] = options.queue
    spec["failurePolicy"]["maxRestarts"] = options.restarts
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["serviceAccountName"] = options.service_account
    container = pod["containers"][0]
    container |= {"image": options.image, "args": options.command}
    for text in options.env:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env {text}: write it as NAME=value; keys belong into a --secret")
        container["env"].append({"name": name, "value": value})
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    return pod


def _capacity(options: argparse.Namespace) -> dict[str, str]:
    selector = {"cloud.google.com/gke-spot": "true"} if options.spot else {}
    return selector | (
        {"cloud.google.com/reservation-name": options.reservation} if options.reservation else {}
    )


def manifest_of(options: argparse.Namespace) -> Manifest:
    """The manifest that was asked for. Raises UsageError."""
    if (options.tpu is None) == (options.gpu is None):
        raise UsageError("give one of --tpu VERSION and --gpu ACCELERATOR")
    if options.tpu and not options.topology:
        raise UsageError("--tpu needs --topology, for example 4x4")
    if not options.command:
        raise UsageError(
            "no command: behind -- stands what laif is to do, for example: -- run configs/quickstart.yaml"
        )
    if options.spot and options.reservation:
        raise UsageError("give one of --spot and --reservation")
    return tpu_manifest(options) if options.tpu else gpu_manifest(options)


def kubectl(options: argparse.Namespace, *arguments: str, stdin: str | None = None) -> int:
    """Runs kubectl in the run's namespace, or prints it; its exit code."""
    context = [f"--context={options.context}"] if options.context else []
    command = ["kubectl", *context, f"--namespace={options.namespace}", *arguments]
    if options.dry_run:
        sys.stdout.write((f"{stdin}# " if stdin else "") + shlex.join(command) + "\n")
        return 0
    try:
        return subprocess.run(command, input=stdin, text=True).returncode
    except FileNotFoundError as error:
        raise UsageError("kubectl is not installed: https://kubernetes.io/docs/tasks/tools") from error


def call(options: argparse.Namespace) -> int:
    """Carries out the verb; the exit code."""
    if not NAME.fullmatch(options.name):
        raise UsageError(
            f"--name {options.name}: lower-case letters, digits and -, at most 30, a letter first"
        )
    if options.verb in ("create", "render"):
        text = yaml.safe_dump(manifest_of(options), sort_keys=False, width=120)
        if options.verb == "render":
            sys.stdout.write(text)
            return 0
        return kubectl(options, "create", "--filename=-", stdin=text)
    selector = f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
    if options.verb == "status":
        return kubectl(options, "get", "jobset", options.name) or kubectl(
            options, "get", "pods", selector, "--output=wide"
        )
    if options.verb == "logs":
        pod = f"{selector},jobset.sigs.k8s.io/job-index={options.slice}"
        pod += f",batch.kubernetes.io/job-completion-index={options.worker}"
        follow = ["--follow"] if options.follow else []
        return kubectl(options, "logs", pod, "--container=laif", f"--tail={options.lines}", *follow)
    return kubectl(options, "delete", "jobset", options.name)  # pods get SIGTERM and their grace period


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("verb", choices=("create", "render", "status", "logs", "stop"))
    made.add_argument("--name", required=True)
    made.add_argument("--namespace", default="default")
    made.add_argument("--context", help="of kubectl's configuration")
    made.add_argument("--dry-run", action="store_true", help="print in place of doing")
    run = made.add_argument_group("create and render")
    run.add_argument("--image")
    run.add_argument("--tpu", choices=sorted(TPUS))
    run.add_argument("--topology", help="of one slice: 4x4 (v5e, v6e), 2x2x4 (v4, v5p)")
    run.add_argument("--slices", type=int, default=1)
    run.add_argument("--chips-per-host", type=int, help="8 for the machine types with all chips on one host")
    run.add_argument("--gpu", help="value of cloud.google.com/gke-accelerator, for example nvidia-h100-80gb")
    run.add_argument("--nodes", type=int, default=1)
    run.add_argument("--gpus-per-node", type=int, default=8)
    run.add_argument("--spot", action="store_true")
    run.add_argument("--reservation")
    run.add_argument("--queue", help="a Kueue local queue")
    run.add_argument("--service-account", default="laif", help="of Kubernetes (default: laif)")
    run.add_argument("--secret", help="a Kubernetes secret whose entries become environment variables")
    run.add_argument("--env", action="append", default=[], metavar="NAME=value")
    run.add_argument("--restarts", type=int, default=3, help="after failures; preemptions do not count")
    logs = made.add_argument_group("logs")
    logs.add_argument("--slice", type=int, default=0)
    logs.add_argument("--worker", type=int, default=0)
    logs.add_argument("--lines", type=int, default=200)
    logs.add_argument("--follow", action="store_true")
    return made


def main(arguments: list[str] | None = None) -> int:
    """0 done, 2 a mistake in what was asked, else kubectl's exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_args(arguments[:cut])
    options.command = arguments[cut + 1 :]
    try:
        if options.verb in ("create", "render") and not options.image:
            raise UsageError(
                "no --image: build launch/Containerfile and push it to a registry of the cluster"
            )
        return call(options)
    except UsageError as error:
        sys.stderr.write(f"job: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
