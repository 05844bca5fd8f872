"""Tokenizers built in code: byte-level (GPT, Llama 3, Qwen) and SentencePiece-like (Llama 2, TinyLlama)."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def byte_tokenizer(
    template: str | None = CHATML, plain_added: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte but `` Z``, and ChatML's special tokens; ``plain_added`` tokens are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "ĠZ"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "Z")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.add_tokens([AddedToken(token, normalized=False) for token in plain_added])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", chat_template=template)


def sentencepiece_tokenizer(template: str | None, scheme: str = "first") -> PreTrainedTokenizerFast:
    """One token a character, a space joined to the letter after it, and one added at the start of a text."""
    letters = [*string.printable.replace(" ", ""), "é"]
    vocab = {
        token: index for index, token in enumerate(["<unk>", "▁", *letters, *(f"▁{c}" for c in letters)])
    }
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", c) for c in letters], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def leaky_tokenizer() -> PreTrainedTokenizerFast:
    """One whose model spells ``</s>`` as its own special token, as converted vocabularies may."""
    letters = [c for c in string.printable if c != " "]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    tokens = [*letters, " ", "</", "s>", "</s>"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\n\n"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
