"""The prompts of a study: read, checked, shuffled, and written once per replicate."""

from typing import Any

from etils import epath

from laif_jax.config import PairSource, PpoConfig, PromptSource, StudyConfig
from laif_jax.data.readers import resolve
from laif_jax.data.sources import SourceRow, load_prompts
from laif_jax.records import DataError, Prompt, file_sha256, read_jsonl, write_jsonl
from laif_jax.stages.artifact import Artifact, run_stage
from laif_jax.stages.context import Context

FILES = {"train": "train.jsonl.gz", "eval": "eval.jsonl.gz"}


def run(ctx: Context) -> Artifact:
    """Writes the training prompts (shuffled by the seed) and the evaluation prompts (in their own order).

    A prompt that occurs in both is dropped from training, and counted: nothing is evaluated on what it was trained on.
    """
    assert isinstance(ctx.config, StudyConfig | PpoConfig)  # the configurations that have prompts
    data = ctx.config.data
    settings: dict[str, Any] = {
        "train": source_settings(data.train, data.root),
        "eval": source_settings(data.eval, data.root),
        "symbols": data.symbols.resolved() if data.symbols else None,
        "seed": ctx.seed,
        "eval_seed": ctx.config.seed,
    }

    def work(folder: epath.Path) -> dict[str, Any]:
        train = load_prompts(data.train, data.root, ctx.seed, data.symbols)
        # Every replicate is evaluated on the same prompts, so that arms can be paired over seeds; in the data's order,
        # which benchmarks rely on.
        evaluation = load_prompts(data.eval, data.root, ctx.config.seed, data.symbols, shuffle=False)
        held_out = {row.prompt.id for row in evaluation}
        kept = [row for row in train if row.prompt.id not in held_out]
        if not kept or not evaluation:
            raise DataError("no prompts are left: check `data.train`, `data.eval` and their limits")
        for name, rows in (("train", kept), ("eval", evaluation)):
            write_jsonl(folder / FILES[name], (_to_row(row) for row in rows))
        return {
            "train": len(kept),
            "eval": len(evaluation),
            "dropped_because_in_eval": len(train) - len(kept),
        }

    return run_stage("prompts", settings, {}, ctx.root, work, main_only=True)


def read(artifact: Artifact, split: str) -> list[SourceRow]:
    """The rows of "train" or "eval", in order."""
    return [
        SourceRow(Prompt.from_row(row["prompt"]), row["completions"])
        for row in read_jsonl(artifact.path / FILES[split])
    ]


def _to_row(row: SourceRow) -> dict[str, Any]:
    return {"prompt": row.prompt.to_row(), "completions": dict(row.completions)}


def source_settings(source: PromptSource | PairSource, root: str | None) -> dict[str, Any]:
    """The source with the hash of its files' content in place of its path: moving the data changes no key. What has no
    files of its own here (a name on the Hub or of TFDS) is known by its name and `root`."""
    settings = source.resolved()
    if source.path is None:
        return settings
    path = resolve(source.path, root)
    if path.is_file():
        settings["path"] = file_sha256(path)
    elif files := _files_of(path, deep=source.kind in ("hf", "tfds")):
        settings["path"] = {str(file.relative_to(path.parent)): file_sha256(file) for file in files}
    elif source.kind == "tfds":
        settings["root"] = root
    return settings


def _files_of(path: epath.Path, deep: bool) -> list[epath.Path]:
    """The files of a pattern (`*` in the last part) or of a folder; `deep`: and of the folders in it."""
    if "*" in path.name:
        found = path.parent.glob(path.name) if path.parent.exists() else ()
    else:
        found = path.glob("**/*" if deep else "*") if path.is_dir() else ()
    return sorted(file for file in found if file.is_file())
