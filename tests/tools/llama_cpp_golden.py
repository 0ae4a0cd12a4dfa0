"""Makes the goldens of GGUF import with llama.cpp: token ids, and top log-probs of the next token.

    python tests/tools/llama_cpp_golden.py tiny tests/models/goldens/llama_cpp_tiny.json
    python tests/tools/llama_cpp_golden.py smollm2 tests/models/goldens/llama_cpp_smollm2.json FILE.gguf

Needs `xllamacpp` and `gguf`. llama.cpp quantises activations where weights are quantised, so the real model is first
written with its weights dequantised to float32; the cache is float32 and attention is the plain one.
"""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models import tiny_gguf

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl named",
    "def fibonacci(n):\n    if n <",
    CHAT,
    "2 + 2 = 4, 3 + 3 = 6, 12 + 12 =",
    "Die Hauptstadt von Österreich ist",
]
SMOLLM2_TEXTS = [
    *tiny_gguf.TEXTS,
    *PROMPTS,
    "Price: $1,234.56 (approx. €1.100) on 2024-01-31 at 23:59:59.999!",
    "   leading spaces\n\t\tand tabs\r\n\r\nCRLF\n\n\n\nmany newlines   ",
    "emoji 👩‍👩‍👧‍👦 flags 🇺🇦 zero\u200bwidth nbsp\u00a0here combining e\u0301 ñ ﬁ Ａ",
    "Русский текст, العربية, עברית, हिन्दी, ไทย, 한국어, 中文，标点。",
    "can't won't I'd you've THEY'LL it's O'Neil 'tis ''quoted''",
    "<|im_start|>user\n<|endoftext|> inside <|im_end|><|im_end|> <repo_name>x<file_sep>",
    "https://example.org/a?b=c&d=%20#frag C:\\path\\to __init__ CamelCaseWord snake_case_word",
    "١٢٣ ½ ² Ⅷ 1٢3",
    "a" * 40 + " " * 17 + "\n" * 5 + "!" * 9,
]


class Llama:
    """A llama.cpp server in this process, on one thread."""

    def __init__(self, path: Path, context: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.port = 0
        self.server = xllamacpp.Server(params)

    def _post(self, route: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": special}
        return self._post("/tokenize", body)["tokens"]

    def top(self, tokens: list[int], count: int) -> list[list[float]]:
        """[token, log-prob] of the most likely next tokens, from the model's own logits."""
        body = {"prompt": tokens, "n_predict": 1, "n_probs": count, "temperature": 0.0, "cache_prompt": False}
        # The server reports nothing for a token that is no text (the end, or half a character), so one that is
        # gets sampled; the bias does not touch the reported log-probs.
        body["logit_bias"] = [[self.tokenize("ab")[-1], 1000.0]]
        answer = self._post("/completion", body)
        return [
            [item["id"], item["logprob"]] for item in answer["completion_probabilities"][0]["top_logprobs"]
        ]


def dequantised(source: Path, target: Path) -> None:
    """The same GGUF file with every weight in float32."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        value = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny() -> dict:
    """Goldens of every tiny file."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in tiny_gguf.CASES.items():
            llama = Llama(tiny_gguf.write(Path(folder) / f"{name}.gguf", case), 256)
            tokens = {text: llama.tokenize(text) for text in tiny_gguf.TEXTS}
            prompts = [ids for ids in tokens.values() if len(ids) > 2]
            found[name] = {
                "tokens": tokens,
                "next": [{"prompt": ids, "top": llama.top(ids, 8)} for ids in prompts],
            }
    return found


def smollm2(source: Path) -> dict:
    """Goldens of the real model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32.gguf"
        dequantised(source, path)
        llama = Llama(path, 1024)
        return {
            "tokens": {text: llama.tokenize(text) for text in SMOLLM2_TEXTS},
            "next": [
                {"prompt": ids, "top": llama.top(ids, 5)}
                for ids in (llama.tokenize(text) for text in PROMPTS)
            ],
        }


def main() -> None:
    """Writes one golden file."""
    kind, out = sys.argv[1], Path(sys.argv[2])
    golden = tiny() if kind == "tiny" else smollm2(Path(sys.argv[3]))
    golden = {"made_by": f"llama.cpp of xllamacpp {xllamacpp.__version__}", **golden}
    out.write_text(
        json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace("},{", "},\n{") + "\n"
    )


if __name__ == "__main__":
    main()
