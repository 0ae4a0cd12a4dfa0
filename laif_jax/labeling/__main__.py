"""`python -m laif_jax.labeling serve --store FOLDER`: the labelling service, without the rest of the package."""

import argparse
import logging
import sys

from laif_jax.labeling.access import add_access, limits_of, read_token
from laif_jax.labeling.leases import LEASE
from laif_jax.labeling.logs import set_up
from laif_jax.labeling.process import end_with_parent
from laif_jax.labeling.service import serve_labels
from laif_jax.labeling.worker import work_off
from laif_jax.records.errors import LaifError


def main() -> int:
    """Exit code 0 after a normal end, 1 if the service could not run (the log says why)."""
    parser = argparse.ArgumentParser(prog="python -m laif_jax.labeling", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    serve = commands.add_parser("serve", help="run the service")
    serve.add_argument("--store", required=True, help="folder, or postgresql://user@host:port/database")
    serve.add_argument("--budget", help="what all calls together may cost: 25USD; none lifts it")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    add_access(serve)
    serve.add_argument("--ready-file", help="gets the address once the service answers")
    serve.add_argument(
        "--patience", type=float, default=0.0, help="seconds to wait for the store's last user"
    )
    serve.add_argument("--end-with-parent", action="store_true", help="end when standard input closes")
    work = commands.add_parser("work", help="take part in the jobs of a service on the same store")
    work.add_argument("--store", required=True, help="folder, or postgresql://user@host:port/database")
    work.add_argument("--end-with-parent", action="store_true", help="end when standard input closes")
    for command in (serve, work):
        command.add_argument(
            "--lease",
            type=float,
            default=LEASE,
            help="seconds of silence after which others take over its calls",
        )
        command.add_argument("--log", choices=("text", "json"), default="text", help="format of the log")
    options = parser.parse_args()
    set_up(options.log)
    if options.end_with_parent:
        end_with_parent()
    try:
        if options.command == "work":
            work_off(options.store, options.lease)
            return 0
        serve_labels(
            options.host,
            options.port,
            options.store,
            options.ready_file,
            options.patience,
            options.budget,
            options.lease,
            token=read_token(options.token_env, options.token_file),
            limits=limits_of(options),
            endpoints=options.endpoints,
            any_endpoint=options.any_endpoint,
            proxy=options.proxy,
        )
    except LaifError as error:
        logging.getLogger("laif_jax.labeling").error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
