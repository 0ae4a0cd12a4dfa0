"""Writes tests/models/goldens: logits of tiny random models of every family, computed by `transformers` with torch.

    python tests/tools/make_model_goldens.py      (needs the `parity` extra)

Weights are drawn from their names (tests/models/golden_state.py), so the files hold configurations, tensor shapes and
logits alone. Each case is run as one padded batch and row by row; both must agree. Where the maths itself depends on
the padded length (dynamic rope), row by row is what counts.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.models.golden_state import draw_tokens, drawn, stored  # noqa: E402

OUT = ROOT / "tests" / "models" / "goldens"
VOCAB = 99
LENGTHS = (22, 13, 5)
PROMPT = 9

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA = _SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _llama(**changes):
    return _LLAMA | changes


def _scaled(kind, max_position=64, **values):
    return _llama(rope_scaling={"type": kind, **values}, max_position_embeddings=max_position)


def _other(name, architecture, **changes):
    return _LLAMA | {"model_type": name, "architectures": [architecture]} | changes


def _mixtral(**changes):
    return _other("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2) | changes


def _neox(**changes):
    return _SIZES | {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        **changes,
    }


def _gemma(name, architecture, **changes):
    fields = _other(name, architecture, hidden_activation="gelu_pytorch_tanh", head_dim=12, **changes)
    return {key: value for key, value in fields.items() if key not in ("hidden_act", "tie_word_embeddings")}


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama1": _llama(num_key_value_heads=4, rms_norm_eps=1e-6, pad_token_id=-1),
    "llama2_gqa": _llama(pretraining_tp=1, attention_bias=False),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True, head_dim=12),
    "llama_linear": _scaled("linear", factor=2.5),
    "llama_dynamic": _scaled("dynamic", 12, factor=3.0),
    "llama3": _llama(rope_theta=500000.0, rope_scaling=_LLAMA3 | {"rope_type": "llama3"}),
    "llama_yarn": _scaled("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama_yarn_mscale": _scaled(
        "yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        mscale=0.707,
        mscale_all_dim=1.2,
        beta_fast=16,
        beta_slow=2,
    ),
    "llama_yarn_factor": _scaled(
        "yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.8, truncate=False
    ),
    "yi": _llama(num_key_value_heads=1, rope_theta=5000000.0, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "deepseek": _llama(
        num_key_value_heads=4, rms_norm_eps=1e-6, bos_token_id=90, eos_token_id=91, pretraining_tp=1
    ),
    "smollm2": _llama(
        tie_word_embeddings=True,
        rope_theta=100000,
        rope_interleaved=False,
        is_llama_config=True,
        initializer_range=0.041666666666666664,
        rope_scaling=None,
    ),
    "mistral": _other("mistral", "MistralForCausalLM", sliding_window=6),
    "mistral_full": _other("mistral", "MistralForCausalLM", sliding_window=None, head_dim=12),
    "mixtral": _mixtral(),
    "mixtral_of_six": _mixtral(
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=6,
        head_dim=12,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        tie_word_embeddings=True,
    ),
    "qwen2": _other(
        "qwen2", "Qwen2ForCausalLM", use_sliding_window=False, sliding_window=6, max_window_layers=1
    ),
    "qwen2_sliding": _other(
        "qwen2",
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen2_layer_types": _other(
        "qwen2",
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": _other("qwen3", "Qwen3ForCausalLM", head_dim=12, tie_word_embeddings=True, attention_bias=False),
    "qwen3_yarn_bias": _other(
        "qwen3",
        "Qwen3ForCausalLM",
        head_dim=16,
        attention_bias=True,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=2,
    ),
    "gemma2": _gemma(
        "gemma2",
        "Gemma2ForCausalLM",
        hidden_act="gelu_pytorch_tanh",
        sliding_window=6,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        cache_implementation="hybrid",
    ),
    "gemma3": _gemma(
        "gemma3_text",
        "Gemma3ForCausalLM",
        sliding_window=6,
        sliding_window_pattern=2,
        query_pre_attn_scalar=20,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3_default_pattern": _gemma(
        "gemma3_text",
        "Gemma3ForCausalLM",
        num_hidden_layers=7,
        hidden_size=24,
        sliding_window=6,
        query_pre_attn_scalar=12,
        final_logit_softcapping=5.0,
        rope_scaling=None,
    ),
    "pythia": _neox(),
    "pythia_sequential": _neox(use_parallel_residual=False, rotary_pct=0.5, hidden_act="gelu_new"),
    "neox_full_rotary_linear": _neox(
        rotary_pct=1.0, rope_scaling={"type": "linear", "factor": 4.0}, attention_bias=False
    ),
}


def _logits(model, rows, mask):
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask)).logits.numpy()


def _step_by_step(model, row, prompt):
    """Logits [length - prompt + 1, vocab] of generation with a cache: after the prompt, then after each token."""
    out, cache = [], None
    with torch.no_grad():
        for start, stop in [(0, prompt)] + [(i, i + 1) for i in range(prompt, len(row))]:
            result = model(
                torch.tensor(row[None, start:stop].tolist()), past_key_values=cache, use_cache=True
            )
            cache = result.past_key_values
            out.append(result.logits[0, -1].numpy())
    return np.stack(out)


def _router_loss(model, rows, mask):
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(rows.tolist()),
            attention_mask=torch.tensor(mask.tolist()),
            output_router_logits=True,
        )
    return out.aux_loss.numpy()


def make(fields):
    """Runs one case. Returns what the JSON keeps, logits float32 [sum of lengths, vocab] row after row, and further
    arrays by name: for dynamic rope, the logits of the first row when generated token by token; for a mixture of
    experts, the load-balancing loss of the padded batch."""
    arguments = {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(fields["model_type"], **arguments)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    gemma = fields["model_type"].startswith("gemma")
    state = model.state_dict()
    family = fields["model_type"]
    weights = {
        name: torch.tensor(drawn(family, name, tuple(value.shape), gemma)) for name, value in state.items()
    }
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    tokens = draw_tokens(LENGTHS, VOCAB)
    # Shortest first: a model with dynamic rope keeps the frequencies of the longest row that it has seen.
    alone = {
        len(row): _logits(model, row[None].tolist(), np.ones((1, len(row))))[0] for row in reversed(tokens)
    }
    alone = [alone[len(row)] for row in tokens]
    padded = np.zeros((len(LENGTHS), max(LENGTHS)), np.int64)
    mask = np.zeros_like(padded)
    for i, row in enumerate(tokens):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1
    together = _logits(model, padded.tolist(), mask)
    for i, row in enumerate(alone):
        difference = np.abs(together[i, : len(row)] - row).max()
        if "dynamic" not in str(fields.get("rope_scaling")):
            assert difference < 1e-5 * np.abs(row).max(), (fields, difference)
    dynamic = "dynamic" in str(fields.get("rope_scaling"))
    # The shortest row brings the frequencies back to the unscaled ones.
    _logits(model, tokens[-1][None].tolist(), np.ones((1, len(tokens[-1]))))
    extra = {"steps": _step_by_step(model, tokens[0], PROMPT)} if dynamic else {}
    if family == "mixtral":
        extra["router_loss"] = _router_loss(model, padded, mask)
    saved = json.loads(config.to_json_string())
    saved["architectures"] = fields["architectures"]
    shapes = {}
    for name, value in state.items():
        shapes |= {kept: list(shape) for kept, shape in stored(family, name, tuple(value.shape)).items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return {"config": fields, "saved_config": saved, "shapes": shapes}, np.concatenate(alone), extra


def main():
    OUT.mkdir(exist_ok=True)
    cases, arrays = {}, {}
    for name, fields in CASES.items():
        cases[name], arrays[name], extra = make(fields)
        arrays |= {f"{name}/{kind}": value for kind, value in extra.items()}
        print(f"{name}: max |logit| {np.abs(arrays[name]).max():.2f}, std {arrays[name].std():.2f}")
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    (OUT / "cases.json").write_text(
        '{"lengths": ' + json.dumps(LENGTHS) + ',\n"cases": {\n' + text + "\n}}\n"
    )
    np.savez_compressed(OUT / "logits.npz", **arrays)


if __name__ == "__main__":
    main()
