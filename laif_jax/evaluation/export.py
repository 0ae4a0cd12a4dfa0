"""Model outputs in the file format that `alpaca_eval --model_outputs FILE` reads unchanged."""

from collections.abc import Sequence
from typing import Any

from laif_jax.records import Prompt, write_json
from laif_jax.records.io import PathLike


def alpaca_eval_rows(
    prompts: Sequence[Prompt], outputs: Sequence[str], generator: str, dataset: str | None = None
) -> list[dict[str, Any]]:
    """Rows of `instruction, output, generator, dataset`, in the prompts' order, text unchanged byte for byte.

    `instruction` is the key by which `alpaca_eval` joins model and reference, so it must be the data's own text; row
    numbers are the key of its length-controlled model, so no row may be missing or moved.

    Args:
      generator: the model's name; without it, AlpacaEval 2's default metric fails.
      dataset: the name of the subset; None: each prompt's `meta["dataset"]`, else its `source`.

    Raises:
      ValueError: as many outputs as prompts are needed; a repeated instruction; a conversation of several turns; an
        empty generator name.
    """
    if len(prompts) != len(outputs):
        raise ValueError(f"{len(prompts)} prompts but {len(outputs)} outputs: every prompt needs its output")
    if not generator:
        raise ValueError("`generator` is empty; alpaca_eval needs the model's name")
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if len(prompt.messages) != 1:
            raise ValueError(
                f"prompt {number} ({prompt.id}) has {len(prompt.messages)} messages; the AlpacaEval format holds "
                "single instructions only"
            )
        if (first := seen.setdefault(prompt.instruction, number)) != number:
            raise ValueError(
                f"prompts {first} and {number} have the same instruction; alpaca_eval joins on it and would mix them up"
            )
        rows.append(
            {
                "instruction": prompt.instruction,
                "output": output,
                "generator": generator,
                "dataset": str(prompt.meta.get("dataset", prompt.source)) if dataset is None else dataset,
            }
        )
    return rows


def write_alpaca_eval(
    path: PathLike,
    prompts: Sequence[Prompt],
    outputs: Sequence[str],
    generator: str,
    dataset: str | None = None,
) -> int:
    """Writes `alpaca_eval_rows` to a `.json` file and returns the number of rows.

    Raises:
      ValueError: as `alpaca_eval_rows`, or the name does not end in `.json`, which alpaca_eval goes by.
    """
    if not str(path).endswith(".json"):
        raise ValueError(f"{path}: alpaca_eval reads the format from the name; it must end in `.json`")
    rows = alpaca_eval_rows(prompts, outputs, generator, dataset)
    write_json(path, rows)
    return len(rows)
