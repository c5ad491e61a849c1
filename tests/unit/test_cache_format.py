"""docs/cache-format.md is enough to read a cache: this does, with none of our code in the reader."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_factory import make_cache, make_rows, mixture_rows
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows
from dpo_cache.pipeline.cache.mixture_table import TABLE_SCHEMA
from dpo_cache.pipeline.cache.pair_order import epoch_order
from dpo_cache.pipeline.cache.shard_file import SCHEMA

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cache-format.md"


def read_sealed(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    assert content[:11] == b'{"sha256":"'
    assert content[75:77] == b'",'
    body = b"{" + content[77:]
    assert hashlib.sha256(body).hexdigest().encode() == content[11:75]
    read: dict[str, Any] = json.loads(body)
    assert read["format_version"] == 1
    return read


def read_verified(path: Path) -> Any:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    return pq.read_table(path).to_pylist()


def key_of(row: dict[str, Any]) -> bytes:
    content = b"\x01"
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        content += struct.pack(f"<Q{len(row[name])}i", len(row[name]), *row[name])
    mask = row["scored_mask"] or []
    return hashlib.sha256(content + struct.pack("<Q", len(mask)) + bytes(mask)).digest()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two shards with one key in both and a mixture with repeats, and one of other pairs with values per token."""
    made = make_cache(tmp_path / "cache")
    rows, others = make_rows(30), make_rows(9, seed=1, token_logps=True)
    made.shards.write(rows[:20])
    made.shards.write(rows[19:])
    made.shards.write(others)
    asked = mixture_rows(rows)
    for name, pairs in (
        ("train", MixtureRows.concatenate([asked, asked.take(np.arange(7))])),
        ("detailed", mixture_rows(others)),
    ):
        made.write_mixture(
            name,
            pairs,
            key_index=made.shards.key_index(),
            tokenization={"chat_template": "ü"},
            sources=[{"path": "made up"}],
            dropped={},
        )
    return made.path


def test_a_reader_written_from_the_document_finds_and_proves_every_training_pair(cache: Path) -> None:
    described = read_sealed(cache / "cache.json")
    canonical = json.dumps(described["identity"], sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == described["reference_id"]
    pointer = read_sealed(cache / "mixtures" / "train.json")
    assert pointer["reference_id"] == described["reference_id"]
    table = read_verified(cache / "mixtures" / f"{pointer['table']['sha256']}.parquet")
    shards = [read_verified(cache / "shards" / f"{sha256}.parquet") for sha256, _, _ in pointer["shards"]]
    assert [len(rows) for rows in shards] == [rows for _, rows, _ in pointer["shards"]]
    assert len(table) == pointer["num_pairs"] == 37

    seen: dict[bytes, int] = {}
    for place in table:
        row = shards[place["shard"]][place["row"]]
        assert row["example_key"] == place["example_key"] == key_of(row)
        assert place["repeat"] == seen.get(row["example_key"], 0)
        seen[row["example_key"]] = place["repeat"] + 1
        prompt = struct.pack(f"<BQ{len(row['prompt_ids'])}i", 1, len(row["prompt_ids"]), *row["prompt_ids"])
        assert place["prompt_hash"] == int.from_bytes(hashlib.sha256(prompt).digest()[:8], "big")
        for side in ("prompt", "chosen", "rejected"):
            assert place[f"{side}_length"] == len(row[f"{side}_ids"])
        mask = row["scored_mask"] or [False] * len(row["prompt_ids"]) + [True] * (
            len(row["chosen_ids"]) + len(row["rejected_ids"])
        )
        split = len(row["prompt_ids"])
        end = split + len(row["chosen_ids"])
        assert row["chosen_tokens"] == sum(mask[:end])
        assert row["rejected_tokens"] == sum(mask[:split]) + sum(mask[end:])
        assert row["ref_chosen_logps"] < 0
    assert len(seen) == pointer["num_distinct_pairs"] == 30
    order = [(place["repeat"], place["prompt_hash"], place["example_key"]) for place in table]
    assert order == sorted(order)
    keys = b"".join(place["example_key"] for place in table)
    assert hashlib.sha256(struct.pack("<BQ", 1, len(table)) + keys).hexdigest() == pointer["digest"]


def test_values_per_token_stand_where_the_document_says_and_add_up(cache: Path) -> None:
    for name, has_them in (("train", False), ("detailed", True)):
        pointer = read_sealed(cache / "mixtures" / f"{name}.json")
        assert pointer.get("token_logps", False) is has_them
        for sha256, _, _ in pointer["shards"]:
            path = cache / "shards" / f"{sha256}.parquet"
            footer = pq.ParquetFile(path).metadata.metadata
            assert footer.get(b"dpo_cache.token_logps") == (b"true" if has_them else None)
            for row in read_verified(path):
                for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
                    values = row[f"ref_{side}_token_logps"]
                    if not has_them:
                        assert values is None
                        continue
                    assert len(values) == row[f"{side}_tokens"]
                    assert sum(values) == pytest.approx(row[f"ref_{side}_logps"], rel=1e-6)
                    common = sum(values[: row[f"{other}_tokens"]])
                    assert common == pytest.approx(row[f"ref_{side}_common_logps"], rel=1e-6)


def test_the_order_of_an_epoch_is_what_the_document_says() -> None:
    digest = "ef" * 32
    seed = hashlib.sha256(f"dpo-cache order 1|{digest}|7|2".encode()).digest()
    random = np.random.RandomState(np.frombuffer(seed, dtype="<u4"))
    blocks = random.permutation(125).tolist()
    expected: list[int] = []
    for start in range(0, 125, 16):
        rows = [row for block in blocks[start : start + 16] for row in range(block * 8, min(block * 8 + 8, 999))]
        expected += [rows[place] for place in random.permutation(len(rows))]
    order = epoch_order(num_pairs=999, block_rows=8, seed=7, epoch=2, mixture_digest=digest)
    assert order.tolist() == expected


def test_the_document_names_every_column_and_member(cache: Path) -> None:
    text = DOCUMENT.read_text()
    named = set(re.findall(r"`([a-z0-9_.]+)`", text))
    pointer = read_sealed(cache / "mixtures" / "detailed.json")
    described = read_sealed(cache / "cache.json")
    assert set(SCHEMA.names) | set(TABLE_SCHEMA.names) <= named
    assert set(pointer) | set(described) | set(described["identity"]) <= named
    for path in [*(cache / "shards").iterdir(), *(cache / "mixtures").glob("*.parquet")]:
        assert {name.decode() for name in pq.ParquetFile(path).metadata.metadata} <= named


def test_the_example_in_the_document_is_right() -> None:
    example = re.search(r"has the key\n\n```\n([0-9a-f]{64})\n```", DOCUMENT.read_text())
    assert example is not None
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "scored_mask": None}
    assert example.group(1) == key_of(row).hex()
