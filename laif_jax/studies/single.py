"""What `laif reward` and `laif ppo` share: from the YAML file of one training run to its results, page and table.

A command says what is trained, what is told of it, and how that looks (`Command`); folders, the frame of
`results.json`, and making the page again are here.
"""

import datetime
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from etils import epath
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from laif_jax.config import RunConfig, dump_config, load_config
from laif_jax.parallel import distributed
from laif_jax.parallel.mesh import make_mesh, set_libtpu_args
from laif_jax.records import check_writable, write_json
from laif_jax.stages import fit
from laif_jax.stages.artifact import Artifact, StageError, versions
from laif_jax.stages.context import Context, Services
from laif_jax.studies.plan import Plan, announce
from laif_jax.studies.report import environment
from laif_jax.studies.table import printable
from laif_jax.training.rows import check_rows
from laif_jax.training.step import enable_compilation_cache

Results = Mapping[str, Any]
Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Command(Generic[Config]):
    """`laif KIND`.

    Attributes:
      kind: "reward" or "ppo", also in `results.json`. schema: of its file. product: what its model is called.
      train: runs the stages, and gives the one whose model is the product.
      describe: what `results.json` holds beside the frame; `settings` among it is shown at the end of the page.
      curves: what the page draws beside `results.json`, kept in `report/data.json`.
      page: the HTML page, from `results.json` and `report/data.json`. table: for the terminal, of a width in columns.
      plan: what it will ask other models for; None: it asks for nothing.
    """

    kind: str
    schema: type[Config]
    product: str
    train: Callable[[Context, Config], Artifact]
    describe: Callable[[Config, Artifact], dict[str, Any]]
    curves: Callable[[Artifact], dict[str, Any]]
    page: Callable[[Results, Mapping[str, Any]], str]
    table: Callable[[Results, int], str]
    plan: Callable[[Config], Plan] | None = None

    def run(self, config_path: str, overrides: Sequence[str] = ()) -> int:
        """Trains and reports; what is finished is not done again, so that the same command goes on after any
        interruption.

        Writes, under `runs/NAME/`: `config.yaml` (resolved), a folder per stage (the product in `KIND-KEY/model`),
        `results.json` and `report/index.html`.

        Returns:
          0.

        Raises:
          ConfigError, MeshError, DataError: a mistake that is found before training. OSError: `out` cannot be
            written. EndpointError: there is a budget, and a model without a price. StageError: training failed.
        """
        config = load_config(config_path, overrides, self.schema)
        set_libtpu_args(config.mesh)
        distributed.initialize()
        check_mesh(config)
        enable_compilation_cache()
        root = run_folder(config)
        distributed.from_main(lambda: check_writable(root))
        if distributed.is_main():
            (root / "config.yaml").write_text(dump_config(config))
            if (plan := self.plan) is not None:
                announce(config, lambda: plan(config), root)
        with Services(config, root) as services:
            ctx = Context(config=config, root=root, seed=config.seed, services=services)
            artifact = self.train(ctx, config)
        if distributed.is_main():
            results = self._results(config, config_path, artifact)
            write_json(root / "results.json", results)
            write_json(root / "report" / "data.json", self.curves(artifact))
            page = self.rebuild(root)
            files = {
                self.product: artifact.path / fit.MODEL,
                "results": root / "results.json",
                "report": page,
            }
            _print_table(lambda width: self.table(printable(results), width), files)
        return 0

    def _results(self, config: Config, config_path: str, artifact: Artifact) -> dict[str, Any]:
        own = self.describe(config, artifact)
        settings = {"configuration": config_path, "scale": config.scale, "seed": config.seed}
        settings |= own.pop("settings")
        return {
            "kind": self.kind,
            "name": config.name,
            "scale": config.scale,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config_path": config_path,
            "versions": versions(),
            "seed": config.seed,
            **own,
            "seconds": artifact.manifest["seconds"],
            "settings": settings | {f"version: {name}": version for name, version in versions().items()},
        }

    def wrote(self, folder: str | epath.Path) -> bool:
        """Whether a run's folder is that of this command."""
        path = epath.Path(folder) / "results.json"
        return path.exists() and json.loads(path.read_text()).get("kind") == self.kind

    def rebuild(self, folder: str | epath.Path) -> epath.Path:
        """Makes the page again, from `results.json` and `report/data.json`; returns its path.

        Raises:
          StageError: the folder holds no finished run.
        """
        root = epath.Path(folder)
        files = (root / "results.json", root / "report" / "data.json")
        for file in files:
            if not file.exists():
                raise StageError(f"{file}: no such file. `laif {self.kind} CONFIG` writes it at its end.")
        results, data = (printable(json.loads(file.read_text())) for file in files)
        page = root / "report" / "index.html"
        page.write_text(self.page(results, data))
        return page


def check_mesh(config: RunConfig) -> None:
    """Before anything is read or compiled: raises MeshError for a mesh that does not fit these devices, and for batches
    that do not divide over it."""
    check_rows(dict(config), make_mesh(config.mesh))


def run_folder(config: RunConfig) -> epath.Path:
    """`<out>/<name>`, with the scale in the name unless it is the default one: scales never share results."""
    suffix = "" if config.scale == "default" else f"-{config.scale}"
    return epath.Path(config.out) / f"{config.name}{suffix}"


# ---- the page and the table --------------------------------------------------------------------------------------


def fill(template: str, results: Results, figures: Mapping[str, str], **values: Any) -> str:
    """The page of a template that extends `single.html.jinja`; `figures` are SVG, by name."""
    settings = {name: str(value) for name, value in results["settings"].items() if value is not None}
    drawn = {name: Markup(text) for name, text in figures.items()}
    page = environment().get_template(template)
    return page.render(results=results, settings=settings, figures=drawn, **values)


def make_table(results: Results, title: str, first: str, columns: Sequence[str]) -> Table:
    """A table of numbers whose first column names the rows; `title` follows the run's name."""
    table = Table(title=f"{escape(results['name'])}: {title}", box=box.SIMPLE)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def with_words(table: Table, results: Results, width: int) -> str:
    """The table, then the verdicts and the warnings, as text."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False)
    console.print(table)
    for line in [*results["verdicts"], *(f"Warning: {text}" for text in results["warnings"])]:
        console.print(line, markup=False)
    return buffer.getvalue()


def _print_table(table: Callable[[int], str], files: Mapping[str, Any]) -> None:
    """Prints a table of the terminal's width, and where the files are (name -> path), to standard output."""
    console = Console(highlight=False)
    text = table(max(80, console.width) if console.is_terminal else 110)
    console.file.write(text + "".join(f"{name}: {path}\n" for name, path in files.items()))
