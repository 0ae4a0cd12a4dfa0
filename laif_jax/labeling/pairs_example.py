"""Made-up pairs whose better side is known, and a configuration that labels them: `laif label example`."""

import random
from pathlib import Path
from typing import Any

from laif_jax.config.schema import SymbolsSpec
from laif_jax.records import DataError, write_jsonl
from laif_jax.worlds import symbols

EXAMPLE = Path(__file__).parent / "example.yaml"


def write_example(folder: str | Path, count: int = 100, seed: int = 0) -> list[Path]:
    """Writes `pairs.jsonl`, answers of a better and a worse simulated model to made-up tasks, and `label.yaml`.

    Each pair has `truth`, the probability that b is better, which is known because the tasks can be solved by program.

    Raises:
      DataError: one of the files is there already.
    """
    folder = Path(folder)
    files = [folder / "pairs.jsonl", folder / "label.yaml"]
    if there := [str(file) for file in files if file.exists()]:
        raise DataError(f"{', '.join(there)}: there already. Choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(seed), []
    skills = (0.9, 0.3)
    for prompt in symbols.make_prompts(SymbolsSpec(max_length=8), 20 * count, seed):
        better, worse = (symbols.teacher_answer(prompt.instruction, skill, rng) for skill in skills)
        qualities = [symbols.quality(prompt.instruction, text) for text in (better, worse)]
        if qualities[0] == qualities[1]:
            continue
        texts = list(zip((better, worse), qualities, skills, strict=True))
        rng.shuffle(texts)
        row: dict[str, Any] = {"prompt": prompt.instruction}
        for side, (text, _, skill) in zip("ab", texts, strict=True):
            row |= {side: text, f"generator_{side}": f"skill-{skill}"}
        rows.append({**row, "truth": float(texts[1][1] > texts[0][1])})
        if len(rows) == count:
            break
    if len(rows) < count:
        raise DataError(f"the example's world has {len(rows)} pairs with these settings; ask for fewer")
    write_jsonl(files[0], rows)
    files[1].write_text(EXAMPLE.read_text("utf-8"), "utf-8")
    return files
