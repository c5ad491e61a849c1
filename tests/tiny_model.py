"""Tiny models, tokenizers and pairs, made in memory and written to a test's folder."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wise", "owls", "watch"]
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def tiny_tokenizer(texts: Sequence[str] = (), vocabulary: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts) or [" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0], pad_token=SPECIAL_TOKENS[1])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    tie_word_embeddings: bool = False,
    attention_dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    hidden_size: int = 32,
    intermediate_size: int = 64,
) -> Path:
    """Write a two-layer Llama with random weights, and its tokenizer, as a model folder."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.2,  # logits far enough apart for a wrong value to show
            tie_word_embeddings=tie_word_embeddings,
            attention_dropout=attention_dropout,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def message_pairs(count: int, *, seed: int = 0, pairs_per_prompt: int = 1) -> list[dict[str, Any]]:
    """Pairs as message lists with the prompt implied; no two answers of a prompt are alike."""
    generator = random.Random(seed)

    def sentence(shortest: int, longest: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(shortest, longest)))

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = f"{len(rows)} {sentence(2, 12)}"
        for _ in range(min(pairs_per_prompt, count - len(rows))):
            chosen, rejected = f"{len(rows)} yes {sentence(1, 20)}", f"{len(rows)} no {sentence(1, 20)}"
            rows.append(message_pair(prompt, chosen, rejected))
    return rows


def message_pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A pair as message lists."""
    asked = {"role": "user", "content": prompt}
    return {
        "chosen": [asked, {"role": "assistant", "content": chosen}],
        "rejected": [asked, {"role": "assistant", "content": rejected}],
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_logps(folder: Path, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> float:
    """The log-probability of an answer, as plainly as it can be written."""
    return float(plain_token_logps(folder, prompt_ids, answer_ids).double().sum())


def plain_token_logps(folder: Path, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> torch.Tensor:
    """The log-probability of each token of an answer: one row, no mask, full logits."""
    model = _loaded(folder)
    ids = torch.tensor([[*prompt_ids, *answer_ids]])
    with torch.no_grad():
        token_logps: torch.Tensor = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return token_logps[len(prompt_ids) - 1 :].gather(1, ids[0, len(prompt_ids) :, None])[:, 0]


def rendered_pair(folder: Path, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected ids of a message pair, rendered by hand with the test template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = "".join(f"<|{m['role']}|>{m['content']}" for m in row["chosen"][:-1]) + "<|assistant|>"
    chosen, rejected = (row[side][-1]["content"] + "<|endoftext|>" for side in ("chosen", "rejected"))
    return ids(prompt), ids(chosen), ids(rejected)


_MODELS: dict[Path, Any] = {}


def _loaded(folder: Path) -> Any:
    if folder not in _MODELS:
        _MODELS[folder] = AutoModelForCausalLM.from_pretrained(folder).eval()
    return _MODELS[folder]
