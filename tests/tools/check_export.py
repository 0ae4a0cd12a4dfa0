"""Checks that `transformers` loads what is exported: every golden model is written by `save_model`, and as a reward
model by `save_reward_model`, and read by torch.

    python tests/tools/check_export.py write FOLDER       (with this package)
    python tests/tools/check_export.py read FOLDER        (with the `parity` extra)

The logits of the second step must be the goldens' (tests/models/goldens/logits.npz), the scores those of rewards.json,
and no weight may be missing, unexpected or freshly initialised.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.models.golden_state import draw_tokens  # noqa: E402


def write(folder: Path) -> None:
    """Exports every golden model, half of them in several files."""
    from laif_jax.models.model import Model, save_model
    from laif_jax.models.reward import save_reward_model
    from tests.models import goldens, tiny_gguf
    from tests.models.test_gguf import GGUFFile
    from tests.models.test_reward import golden_reward_model

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = GGUFFile(tiny_gguf.write(folder / "t.gguf", tiny_gguf.CASES["llama-smollm"])).tokenizer()
    for i, name in enumerate(goldens.CASES):
        cfg, params = goldens.model(name)
        save_model(folder / name, Model(cfg, params, tokenizer), max_shard_bytes=30_000 if i % 2 else 1 << 30)
        save_reward_model(folder / f"reward-{name}", golden_reward_model(name, tokenizer))


def read(folder: Path) -> None:
    """Loads each with `transformers` and compares logits with the goldens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cases = json.loads((ROOT / "tests/models/goldens/cases.json").read_text())
    ends = np.cumsum(cases["lengths"])[:-1]
    with np.load(ROOT / "tests/models/goldens/logits.npz") as arrays:
        golden = {name: np.split(arrays[name], ends) for name in arrays}
    for name, case in cases["cases"].items():
        worst = 0.0
        for row, want in zip(
            draw_tokens(tuple(cases["lengths"]), case["config"]["vocab_size"]), golden[name]
        ):
            # Loaded anew for each row: dynamic rotary embeddings remember the longest row before.
            model, info = AutoModelForCausalLM.from_pretrained(
                folder / name, output_loading_info=True, attn_implementation="eager"
            )
            assert not any(info.values()), (name, info)
            assert model.dtype == torch.float32
            with torch.no_grad():
                got = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].numpy()
            worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.decode(tokenizer.encode("Hello  world 123\n")) == "Hello  world 123\n"
        print(f"{name}: logits differ by {worst:.1e} of the largest")
        assert worst < 2e-5, name
        read_scores(folder, name, cases)


def read_scores(folder: Path, name: str, cases: dict) -> None:
    """Loads a reward model with `transformers` and compares scores with the goldens."""
    import torch
    from transformers import AutoModelForSequenceClassification

    golden = json.loads((ROOT / "tests/models/goldens/rewards.json").read_text())["scores"][name]
    worst = 0.0
    rows = draw_tokens(tuple(cases["lengths"]), cases["cases"][name]["config"]["vocab_size"])
    for row, want in zip(rows, golden):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder / f"reward-{name}", output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info.values()), (name, info)
        assert model.config.num_labels == 1
        padded = np.append(row, [model.config.pad_token_id] * 3).astype(np.int64)[None]
        mask = torch.from_numpy((np.arange(padded.shape[1]) < len(row)).astype(np.int64))[None]
        with torch.no_grad():
            got = model(torch.from_numpy(padded), attention_mask=mask).logits.item()
        worst = max(worst, abs(got - want))
    print(f"reward-{name}: scores differ by {worst:.1e}")
    assert worst < 2e-5 or "dynamic" in name, name


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
