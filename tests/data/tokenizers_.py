"""Small real tokenizers, made in a moment: byte-level BPE with ChatML, and one character per token."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-Instruct's template."""

LLAMA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""In the manner of Llama 2: BOS before every question, answers trimmed, no generation header."""

_TEXT = ["hello world how are you", "fine thanks and you", "user assistant system", "what is that \n\n\n"] * 4


@functools.lru_cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


def chatml(template: str | None = CHATML, **special: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, 320 tokens; EOS and pad are both `<|im_end|>`, BOS is `<|im_start|>`, as in SmolLM2-Instruct."""
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe()), **names)
    tokenizer.chat_template = template
    return tokenizer


def llama() -> PreTrainedTokenizerFast:
    """The same tokens under a template that writes BOS itself."""
    return chatml(LLAMA, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def characters(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character, so that tokens can be read; `|` is EOS and pad."""
    alphabet = ["|", *sorted(set("abcdefghijklmnopqrstuvwxyzHAU: \n?!.0123456789"))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="|", pad_token="|")
    wrapped.chat_template = template
    return wrapped
