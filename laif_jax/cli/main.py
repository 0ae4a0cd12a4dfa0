"""The command line: parses arguments, calls one function, shows errors that a user can mend as one message."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from laif_jax.cli import doctor, label, sweep
from laif_jax.labeling.access import add_access
from laif_jax.records import LaifError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `laif ARGUMENTS` and returns its exit status: 0 done, 1 a stage failed, 2 a mistake in what was asked, 75 it
    was asked to stop and saved (start it again)."""
    options = _parsed(arguments)
    # Read when JAX and transformers are imported, which the verbs do.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _calm_libtpu()
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for noisy in ("jax", "absl", "orbax", "httpx", "httpcore", "matplotlib", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return options.call(options)
    except KeyboardInterrupt:
        print(
            "laif: interrupted. What was finished is kept; run the same command again to go on.",
            file=sys.stderr,
        )
        return 130
    except (LaifError, OSError) as error:
        if options.verbose:
            raise
        print(f"laif: {error}", file=sys.stderr)
        return 2


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; settings (`key=value`) may also stand after them, where argparse no longer looks for any."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if settings != rest or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _calm_libtpu(devices: Path = Path("/dev")) -> None:
    """Where libtpu is installed and no TPU is (`laif compile` needs no more), JAX tries it and goes on with what there
    is, but libtpu first prints errors about a slice that it cannot find: it is told of one."""
    if not (any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))):
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


# ---- verbs -----------------------------------------------------------------------------------------------------


def _check_config(options: argparse.Namespace, schema: str = "StudyConfig") -> None:
    """Tells a mistake in the configuration at once; what the verbs import takes seconds."""
    from laif_jax import config

    config.load_config(options.config, options.overrides, getattr(config, schema))


def _stoppable(call: Callable[[str, Sequence[str]], int], options: argparse.Namespace) -> int:
    """Runs a training verb; SIGTERM or a maintenance event ends it with a code that says: start me again."""
    from laif_jax.parallel import preemption

    try:
        with preemption.listening():
            return call(options.config, options.overrides)
    except preemption.Preempted as notice:
        print(f"laif: {notice}", file=sys.stderr)
        return preemption.EXIT_CODE


def _run(options: argparse.Namespace) -> int:
    _check_config(options)
    from laif_jax.studies.run import run_study

    return _stoppable(run_study, options)


def _reward(options: argparse.Namespace) -> int:
    _check_config(options, "RewardConfig")
    from laif_jax.studies.reward import REWARD

    return _stoppable(REWARD.run, options)


def _ppo(options: argparse.Namespace) -> int:
    _check_config(options, "PpoConfig")
    from laif_jax.studies.ppo import PPO

    return _stoppable(PPO.run, options)


def _inspect(options: argparse.Namespace) -> int:
    from laif_jax.config.load import describes

    kind = describes(options.config).__name__ if options.stage == "reward" else "StudyConfig"
    _check_config(options, kind)
    from laif_jax.studies.inspect import inspect_stage

    inspect_stage(options.config, options.overrides, options.stage, options.batches)
    return 0


def _compile(options: argparse.Namespace) -> int:
    if options.topology:  # read when JAX and the TPU compiler are loaded: this need be no TPU machine
        for name, value in _NO_TPU_HERE.items():
            os.environ.setdefault(name, value)
    from laif_jax.aot.command import run_compile

    status, text = run_compile(
        options.config,
        options.overrides,
        topology=options.topology,
        stages=options.stage or (),
        as_json=options.json,
        searches=options.search,
        save=options.save,
        prices=options.prices,
        estimates=options.estimate,
    )
    print(text)
    return status


_NO_TPU_HERE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def _report(options: argparse.Namespace) -> int:
    from laif_jax.studies.ppo import PPO
    from laif_jax.studies.reward import REWARD
    from laif_jax.studies.run import rebuild_report

    rebuild = next((one.rebuild for one in (REWARD, PPO) if one.wrote(options.run)), rebuild_report)
    print(rebuild(options.run))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from laif_jax.models.fetch import fetch

    result = fetch(options.name, options.dest)
    print("\n".join(result.lines))
    print(result.path)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from laif_jax.models.convert import convert

    print(convert(options.source, options.dest, options.dtype))
    return 0


def _serve_labels(options: argparse.Namespace) -> int:
    from laif_jax.labeling.access import limits_of, read_token
    from laif_jax.labeling.logs import set_up
    from laif_jax.labeling.service import serve_labels

    set_up(options.log, logging.DEBUG if options.verbose else logging.INFO)
    serve_labels(
        options.host,
        options.port,
        options.store,
        budget=options.budget,
        token=read_token(options.token_env, options.token_file),
        limits=limits_of(options),
        endpoints=options.endpoints,
        any_endpoint=options.any_endpoint,
        proxy=options.proxy,
    )
    return 0


def _serve_model(options: argparse.Namespace) -> int:
    if options.critics and not options.reward:
        raise LaifError("`--critic` has an effect with `--reward` only")
    from laif_jax.serving import serve_model

    serve_model(
        options.checkpoint,
        host=options.host,
        port=options.port,
        name=options.name,
        template=options.template,
        dtype=options.dtype,
        reward=options.reward,
        **({"critics": options.critics} if options.critics else {}),
    )
    return 0


# ---- parser ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-v", "--verbose", action="store_true", help="debug log, and tracebacks of all errors"
    )
    parser = argparse.ArgumentParser(
        prog="laif",
        description="Learning from AI feedback: does it beat supervised fine-tuning on a strong teacher?",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, call: Callable[[argparse.Namespace], int], text: str, to=verbs
    ) -> argparse.ArgumentParser:
        added = to.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(call=call)
        return added

    def with_config(added: argparse.ArgumentParser) -> None:
        added.add_argument("config", help="a YAML file")
        added.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings that win over the file's"
        )

    with_config(verb("run", _run, "run a study to its report; finished stages are not run again"))
    many = "run many settings of a study; what they share runs once, what trains alike trains together"
    sweep.add_arguments(verb("sweep", sweep.sweep, many))
    with_config(verb("reward", _reward, "train and measure a reward model on files of pairs"))
    with_config(verb("ppo", _ppo, "train a policy by reinforcement learning on given rewards"))
    inspect = verb("inspect", _inspect, "print real training batches, tokens coloured by loss weight")
    with_config(inspect)
    inspect.add_argument("--stage", choices=("sft", "dpo", "reward"), default="sft")
    inspect.add_argument("--batches", type=int, default=1, help="how many batches")
    known = "know before you pay: compile each step for a TPU slice, on any machine; memory, work and cost per chip"
    compiling = verb("compile", _compile, known)
    with_config(compiling)
    compiling.add_argument(
        "--topology", metavar="SLICE", help="for example v5e-16 (default: this machine's devices)"
    )
    compiling.add_argument(
        "--stage",
        action="append",
        choices=("sft", "reward", "dpo", "ppo", "sample"),
        help="may be repeated (default: all that the file has)",
    )
    compiling.add_argument("--json", action="store_true", help="one JSON object")
    compiling.add_argument(
        "--search", action="store_true", help="find the largest micro_batch and the cheapest remat that fit"
    )
    compiling.add_argument(
        "--save", metavar="DIR", help="keep the train steps' executables, for the pod to start with"
    )
    compiling.add_argument(
        "--estimate", action="store_true", help="a few seconds' estimate, without the TPU compiler"
    )
    compiling.add_argument("--prices", metavar="FILE", help="another file of chips and prices")
    verb("report", _report, "make a finished study's report again").add_argument(
        "run", help="the folder runs/NAME"
    )

    doctor.add_arguments(
        verb("doctor", doctor.doctor, "what is here, and what will be slow or will fail here, in plain words")
    )

    fetch = verb("fetch", _fetch, "get pretrained weights, check their hash, and say what was done")
    fetch.add_argument("name", help="for example smollm2-135m")
    fetch.add_argument("--dest", help="the folder to put them in (default: the cache, LAIF_CACHE)")

    convert = verb("convert", _convert, "write any model that can be read as a Hugging Face folder")
    convert.add_argument("source", help="a folder, a .gguf file, a fetchable name or a Hub id")
    convert.add_argument("dest", help="the folder to write")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")

    label.add_verbs(
        verb,
        verbs.add_parser("label", help="plan a study's labelling; look after a store").add_subparsers(
            required=True, metavar="VERB"
        ),
    )

    serve = verbs.add_parser("serve", help="start a server").add_subparsers(required=True, metavar="WHAT")
    labels = verb("labels", _serve_labels, "the labelling service (no JAX in it)", serve)
    labels.add_argument("--host", default="127.0.0.1")
    labels.add_argument("--port", type=int, default=8080)
    labels.add_argument(
        "--store", default="labels", help="its folder, or postgresql://user@host:port/database"
    )
    labels.add_argument(
        "--budget", help="a hard cap on what all calls cost, for example 25USD; none lifts it"
    )
    labels.add_argument("--log", choices=("text", "json"), default="text", help="format of the log")
    add_access(labels)
    model = verb("model", _serve_model, "one of our checkpoints over the OpenAI chat protocol", serve)
    model.add_argument("checkpoint", help="a folder in Hugging Face layout, a .gguf file or a fetchable name")
    model.add_argument("--host", default="127.0.0.1")
    model.add_argument("--port", type=int, default=8000)
    model.add_argument("--name", help="the model's name in requests (default: the folder's)")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of compute")
    model.add_argument("--template", choices=("model", "human_assistant"), help="of prompts (default: model)")
    model.add_argument(
        "--reward",
        action="store_true",
        help="the folder is a reward model's: answer critics' pairwise questions",
    )
    model.add_argument(
        "--critic",
        action="append",
        dest="critics",
        metavar="NAME",
        help="with --reward: a critic (or folder) whose questions are answered; may be repeated (default: all shipped)",
    )
    return parser
