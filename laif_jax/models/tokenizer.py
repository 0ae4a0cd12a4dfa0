"""Tokenizers: of a model folder, a GGUF file, the Hub, or the synthetic world."""

import copy
import json
import tempfile
from collections.abc import Set
from pathlib import Path

from etils import epath
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from laif_jax.records.errors import LaifError
from laif_jax.worlds.symbols import CHARSET

SYMBOLS = "symbols"
_SYMBOLS_SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
_SYMBOLS_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + eos_token }}"
    "{% else %}{{ '<user>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_PAD = "<|pad|>"
# What a tokenizer may consist of, for folders that are not on this machine.
_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


class TokenizerError(LaifError, ValueError):
    """A tokenizer cannot be found or read; the message says where and what to do."""


def symbols_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the synthetic world, after <pad>, <eos>, <unk> and the two role markers."""
    vocab = {token: i for i, token in enumerate((*_SYMBOLS_SPECIAL, *CHARSET))}
    tokenizer = Tokenizer(WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SYMBOLS_SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=_SYMBOLS_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _auto(source: str) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer")
    return tokenizer


def _from_folder(folder: Path, shown: str) -> PreTrainedTokenizerFast:
    try:
        if (folder / "tokenizer.json").exists():
            # The class that applies tokenizer.json as it is; model-specific classes rebuild parts of it.
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        return _auto(str(folder))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise TokenizerError(
            f"{shown}: no tokenizer could be read from this folder ({error}). Copy the model's tokenizer.json and "
            "tokenizer_config.json there, or name another tokenizer (model.tokenizer=...)."
        ) from error
    except Exception as error:  # tokenizers raises plain `Exception` for a malformed tokenizer.json
        if type(error) is not Exception:
            raise
        raise TokenizerError(f"{shown}: tokenizer.json is malformed ({error}). Copy it again.") from error


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer.

    Args:
      source: "symbols", a folder (local or `gs://`) with tokenizer files, a `.gguf` file, a name that `laif fetch`
        knows, or a Hub id.

    Raises:
      TokenizerError: nothing of the kind is there, or it cannot be read.
    """
    if source == SYMBOLS:
        return symbols_tokenizer()
    path = epath.Path(source)
    if source.endswith(".gguf"):
        from laif_jax.models.gguf import GGUFFile

        return GGUFFile(path).tokenizer()
    if path.is_dir():
        if "://" not in source:
            return _from_folder(Path(source), source)
        with tempfile.TemporaryDirectory() as local:
            for pattern in _FILES:
                for file in path.glob(pattern):
                    if not file.name.endswith(".index.json"):
                        (Path(local) / file.name).write_bytes(file.read_bytes())
            return _from_folder(Path(local), source)
    from laif_jax.models import fetch

    if source in fetch.KNOWN:
        return _from_folder(Path(fetch.fetch(source).path), source)
    if not fetch.is_hub_id(source):
        raise TokenizerError(
            f"{source}: no such tokenizer: it is not a folder, a .gguf file, a Hub id (owner/name), `symbols`, or one "
            f"of {', '.join(fetch.KNOWN)}. Check the path."
        )
    try:
        return _auto(source)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{source}: no such folder, and the Hub gave no tokenizer ({error}). Check the name and the network."
        ) from error


def with_token(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[PreTrainedTokenizerFast, int]:
    """(the tokenizer, the id of the token `text`); where it has no such token, a copy that has it, as a special one."""
    if text in (vocab := tokenizer.get_vocab()):
        return tokenizer, vocab[text]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)], special_tokens=True)
    return tokenizer, tokenizer.get_vocab()[text]


def with_pad(tokenizer: PreTrainedTokenizerFast, ends: Set[int]) -> tuple[PreTrainedTokenizerFast, int]:
    """(the tokenizer, its padding token), where that occurs in no text; else a copy with a new one, `<|pad|>`.

    `transformers` takes a sequence's last token that is not padding for its end, so padding must not be one of `ends`,
    nor a token that the chat template writes.
    """
    pad, template = tokenizer.pad_token_id, str(tokenizer.chat_template or "")
    if (
        pad is not None
        and pad not in {*ends, tokenizer.eos_token_id}
        and str(tokenizer.pad_token) not in template
    ):
        return tokenizer, pad
    tokenizer, pad = with_token(copy.deepcopy(tokenizer), _PAD)
    tokenizer.pad_token = _PAD
    return tokenizer, pad


def save_tokenizer(directory: epath.PathLike, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes tokenizer files that `load_tokenizer` and `transformers` (4 and 5) load; each appears complete.

    Raises:
      OSError: one cannot be written; what was there before is untouched.
    """
    folder = epath.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        config = Path(local) / "tokenizer_config.json"
        settings = json.loads(config.read_text())
        if (
            settings.get("tokenizer_class") == "TokenizersBackend"
        ):  # the name before transformers 5, known to both
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        for file in sorted(Path(local).iterdir()):
            _write(folder / file.name, file.read_bytes())


def _write(path: epath.Path, content: bytes) -> None:
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror or error}. Free space or choose another folder",
        ) from error
