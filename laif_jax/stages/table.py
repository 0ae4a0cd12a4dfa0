"""Tables of what the model in training writes for a few prompts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from laif_jax.config import SamplingSpec
from laif_jax.data.chat import encode_prompts, end_of_turn_ids
from laif_jax.models.model import Model
from laif_jax.parallel import distributed
from laif_jax.records import Prompt, append_jsonl
from laif_jax.rollout.generate import generate
from laif_jax.stages.context import Context
from laif_jax.training.state import TrainState


class SampleTable:
    """A callback of the training loop: samples completions, appends them to a file, and returns the table as text
    (Markdown) for TensorBoard. Step and prompt determine the sample, so a resumed run writes the same rows."""

    def __init__(
        self, ctx: Context, model: Model, prompts: Sequence[Prompt], path: epath.Path, spec: SamplingSpec
    ):
        self._spec = spec.model_copy(update={"samples": 1})
        self._ctx, self._prompts, self._path = ctx, prompts, path
        self._cfg, self._tokenizer = model.cfg, model.tokenizer
        template = ctx.config.model.template
        self._encoded = encode_prompts(
            model.tokenizer,
            [prompt.messages for prompt in prompts],
            template,
            max(1, model.cfg.max_position - spec.max_new_tokens),
        )
        self._ends = tuple(dict.fromkeys((*model.cfg.eos_ids, *end_of_turn_ids(model.tokenizer, template))))

    def __call__(self, step: int, state: TrainState) -> str:
        samples = generate(
            state.params,
            self._cfg,
            self._encoded.tokens,
            self._spec,
            jax.random.fold_in(jax.random.key(self._ctx.seed), step),
            dtype=jnp.dtype(self._ctx.config.model.dtype),
            eos_ids=self._ends,
            mesh=self._ctx.mesh,
        )
        lines = ["| prompt | completion |", "|---|---|"]
        for prompt, sample in zip(self._prompts, samples, strict=True):
            text = str(self._tokenizer.decode(sample.tokens, skip_special_tokens=True))
            row = {
                "step": step,
                "prompt": prompt.instruction,
                "completion": text,
                "finish_reason": sample.finish_reason,
            }
            if distributed.is_main():
                append_jsonl(self._path, row)
            lines.append(f"| {_cell(prompt.instruction)} | {_cell(text)} |")
        return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
