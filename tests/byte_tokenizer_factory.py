"""A tokenizer whose ids can be written down by hand: a byte's id is its value, special tokens follow from 256."""

from __future__ import annotations

from pathlib import Path

from dpo_cache.pipeline.data.token_pair import TokenPair
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, IM_START, IM_END, TWO_NEWLINES = 256, 257, 258, 259, 260
SPECIAL_TOKENS = {"<s>": BOS, "</s>": EOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
NAMES = {number: token for token, number in SPECIAL_TOKENS.items()} | {TWO_NEWLINES: "\n\n"}

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def write_byte_tokenizer(
    folder: Path,
    *,
    chat_template: str | dict[str, str] | None = None,
    bos_token: str | None = "<s>",
    eos_token: str | None = "</s>",
    pad_token: str | None = None,
    merges_newlines: bool = False,
    adds_bos: bool = False,
) -> str:
    """Write the tokenizer's files and return their folder.

    Args:
        folder: Where to.
        chat_template: The tokenizer's own template, or several by name.
        bos_token: Its bos.
        eos_token: Its eos.
        pad_token: Its pad.
        merges_newlines: Whether two newlines become one token.
        adds_bos: Whether it writes a bos in front of plain text by itself, as Llama's does.
    """
    characters = _characters_of_bytes()
    newline = characters[ord("\n")]
    merged = {newline * 2: TWO_NEWLINES} if merges_newlines else {}
    vocabulary = {character: byte for byte, character in enumerate(characters)} | SPECIAL_TOKENS | merged
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)] if merges_newlines else []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


def ids(text: str) -> list[int]:
    """The ids of a text without special tokens."""
    return list(text.encode())


def marked(pair: TokenPair, side: str) -> str:
    """One side of a pair as text, the scored tokens in ⟦ ⟧."""
    answer, scored = {
        "chosen": (pair.chosen_ids, pair.chosen_scored),
        "rejected": (pair.rejected_ids, pair.rejected_scored),
    }[side]
    tokens = [*pair.prompt_ids.tolist(), *answer.tolist()]
    flags = [*pair.prompt_scored.tolist(), *scored.tolist()]
    text, inside = "", False
    for token, flag in zip(tokens, flags, strict=True):
        if flag != inside:
            text += "⟦" if flag else "⟧"
        inside = flag
        text += NAMES.get(token) or chr(token)
    return text + ("⟧" if inside else "")


def _characters_of_bytes() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself where printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
