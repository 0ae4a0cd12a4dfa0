"""`laif doctor`, and what is left of `laif` where the installation is broken. The standard library alone at the top."""

import argparse
import sys
from collections.abc import Callable, Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments and options of the verb."""
    parser.add_argument("config", nargs="?", help="a YAML file that is to run here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for JAX to find its devices (default: 120)",
    )


def doctor(options: argparse.Namespace) -> int:
    """0: nothing will fail here; 1: something will."""
    from laif_jax.studies.doctor import Here, examine, show

    report = examine(options.config, options.overrides, Here(timeout=options.timeout))
    print(show(report, as_json=options.json))
    return 0 if report.ok else 1


def without_the_rest(error: ImportError) -> Callable[..., int]:
    """`main` of an installation in which the verbs cannot be imported: `laif doctor` works, and says why."""

    def main(arguments: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        if arguments[:1] != ["doctor"]:
            print(
                f"laif: the installation is broken ({error}). `laif doctor` says what is missing",
                file=sys.stderr,
            )
            return 2
        parser = argparse.ArgumentParser(prog="laif doctor")
        add_arguments(parser)
        return doctor(parser.parse_args(arguments[1:]))

    return main
