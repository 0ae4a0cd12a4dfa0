"""`laif sweep`: many settings of a study."""

import argparse
import sys

from laif_jax.records import LaifError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments and options of the verb."""
    parser.add_argument("config", help="a study's YAML file")
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="axis=[...]",
        help="dpo.beta=[0.05,0.1] seed=[0,1]: all combinations; key=value holds for all points",
    )
    parser.add_argument(
        "--zip", action="store_true", help="the first values of all axes together, then the second, ..."
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--one-by-one", action="store_true", help="train one model after the other")
    how.add_argument(
        "--together", type=int, metavar="N", help="train up to N models at once (default: by their size)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def sweep(options: argparse.Namespace) -> int:
    """0: all points are finished; 1: a stage failed."""
    if options.together is not None and options.together < 1:
        raise LaifError(f"--together {options.together}: give a number of models, at least 1")
    from laif_jax.studies.sweep_axes import make_points, read_axes

    # Tells a mistake at once; what is imported next takes seconds.
    make_points(options.config, *read_axes(options.config, options.overrides), paired=options.zip)
    from rich.console import Console

    from laif_jax.parallel import preemption
    from laif_jax.studies.sweep import run_sweep

    console = Console(highlight=False)
    try:
        with preemption.listening():
            status, text = run_sweep(
                options.config,
                options.overrides,
                paired=options.zip,
                together=1 if options.one_by_one else options.together,
                as_json=options.json,
                width=max(80, console.width) if console.is_terminal else 110,
            )
    except preemption.Preempted as notice:
        print(f"laif: {notice}", file=sys.stderr)
        return preemption.EXIT_CODE
    print(text, end="" if text.endswith("\n") else "\n")
    return status
