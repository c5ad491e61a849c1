"""The demo's reference: a tokenizer trained on the demo's text, and a Llama taught to speak like it.

A short supervised run over both manners of answering, so that the reference gives either a probability that means
something. Deterministic: the same files give the same weights on the same machine.

    python scripts/demo/reference_model.py PAIRS.jsonl FOLDER [STEPS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from dpo_cache.stages.console.library_output import quiet_libraries
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
STEPS = 120
BATCH = 16
LEARNING_RATE = 2e-3
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0], pad_token=SPECIAL_TOKENS[1])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def supervised_batches(sequences: list[list[int]], pad_id: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of padded ids and labels, reshuffled each pass."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = [torch.tensor(sequences[index]) for index in order[start : start + BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad_id)
            yield ids, ids.masked_fill(ids == pad_id, -100)


def main(pairs_file: Path, folder: Path, steps: int) -> None:
    """Train tokenizer and model, and save both as a model folder."""
    quiet_libraries()
    pairs = [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    dialogues = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    tokenizer = train_tokenizer([message["content"] for dialogue in dialogues for message in dialogue])
    sequences = [tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False) for dialogue in dialogues]

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    batches = supervised_batches(sequences, tokenizer.pad_token_id)
    loss = torch.tensor(0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 10) * (1 - step / steps)
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels, attention_mask=None).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"reference model: {parameters / 1e6:.1f}M parameters, {loss.item():.2f} nats per token", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else STEPS)
