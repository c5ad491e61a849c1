"""docs/cache-format.md is enough for a reader in another tool: this one is SQL in DuckDB, with no code of ours.

It does the steps of "What a reader should check" in their order, then reads every training pair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_factory import make_cache, make_rows, mixture_rows
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows
from dpo_cache.pipeline.cache.scored_pair import ScoredPair

duckdb: Any = pytest.importorskip("duckdb", reason="the tool that reads is not installed")

FUNCTIONS = """
CREATE MACRO seal_holds(text) AS
    text[:11] = '{"sha256":"' AND text[76:77] = '",' AND sha256('{' || text[78:]) = text[12:75];
CREATE MACRO unsealed(text) AS ('{' || text[78:])::JSON;
CREATE MACRO hex4(n) AS printf('%02x%02x%02x%02x', n & 255, (n >> 8) & 255, (n >> 16) & 255, (n >> 24) & 255);
CREATE MACRO hex8(n) AS hex4(n::INTEGER) || '00000000';
CREATE MACRO ids_hex(ids) AS hex8(len(ids)) || array_to_string(list_transform(ids, lambda n: hex4(n)), '');
CREATE MACRO mask_hex(mask) AS
    hex8(len(mask)) || array_to_string(list_transform(mask, lambda scored: if(scored, '01', '00')), '');
CREATE MACRO key_of(prompt, chosen, rejected, mask) AS unhex(sha256(unhex(
    '01' || ids_hex(prompt) || ids_hex(chosen) || ids_hex(rejected) || mask_hex(coalesce(mask, [])))));
"""

PAIRS = """
SELECT m.*, s.* EXCLUDE (example_key)
FROM read_parquet('CACHE/mixtures/<sha256>.parquet') m
JOIN read_parquet('CACHE/shards/*.parquet') s USING (example_key)
ORDER BY m.repeat, m.prompt_hash, m.example_key
"""


@pytest.fixture
def rows() -> list[ScoredPair]:
    return make_rows(30)


@pytest.fixture
def cache(tmp_path: Path, rows: list[ScoredPair]) -> Path:
    """Two shards and a mixture with repeats."""
    made = make_cache(tmp_path / "cache")
    made.shards.write(rows[:20])
    made.shards.write(rows[20:])
    asked = mixture_rows(rows)
    made.write_mixture(
        "train",
        MixtureRows.concatenate([asked, asked.take(np.arange(7))]),
        key_index=made.shards.key_index(),
        tokenization={"chat_template": "ü"},
        sources=[{"path": "made up"}],
        dropped={},
    )
    return made.path


class Reader:
    """Asks one cache questions in SQL."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._database = duckdb.connect()
        self._database.execute(FUNCTIONS)
        self._table = ""

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        query = query.replace("CACHE", str(self._cache)).replace("<sha256>", self._table)
        found: list[tuple[Any, ...]] = self._database.execute(query).fetchall()
        return found

    def check(self) -> None:
        """The document's list, one after another."""
        for path in ("cache.json", "mixtures/train.json"):
            query = f"SELECT seal_holds(content), unsealed(content)->>'format_version' FROM read_text('CACHE/{path}')"
            assert self.ask(query) == [(True, "1")]
        self.ask("CREATE TABLE pointer AS SELECT unsealed(content) AS p FROM read_text('CACHE/mixtures/train.json')")
        [[self._table]] = self.ask("SELECT p->>'$.table.sha256' FROM pointer")
        identity, pointed = (
            "SELECT unsealed(content)->>'reference_id' FROM read_text('CACHE/cache.json')",
            "SELECT p->>'reference_id' FROM pointer",
        )
        assert self.ask(identity) == self.ask(pointed)
        references = "SELECT DISTINCT decode(value) FROM parquet_kv_metadata('CACHE/*/*.parquet') WHERE decode(key) = "
        assert self.ask(references + "'dpo_cache.reference_id'") == self.ask(identity)
        is_named = "parse_filename(filename, true) = sha256(content)"
        assert self.ask(f"SELECT count(*), bool_and({is_named}) FROM read_blob('CACHE/*/*.parquet')") == [(3, True)]
        listed = "SELECT shard->>0 FROM (SELECT unnest((p->'shards')::JSON[]) AS shard FROM pointer)"
        assert self.ask(f"""
            SELECT bool_and(s.example_key = m.example_key), count(*)
            FROM read_parquet('CACHE/mixtures/<sha256>.parquet') m
            JOIN (SELECT row_number() OVER () - 1 AS shard, * FROM ({listed}) AS _(sha256)) l USING (shard)
            LEFT JOIN read_parquet('CACHE/shards/*.parquet', filename=true, file_row_number=true) s
                ON parse_filename(s.filename, true) = l.sha256 AND s.file_row_number = m.row
        """) == [(True, 37)]
        assert self.ask("""
            SELECT bool_and(key_of(prompt_ids, chosen_ids, rejected_ids, scored_mask) = example_key)
            FROM read_parquet('CACHE/shards/*.parquet')
        """) == [(True,)]
        assert self.ask("""
            SELECT count(*) FROM read_parquet('CACHE/shards/*.parquet')
            WHERE NOT (isfinite(ref_chosen_logps) AND isfinite(ref_rejected_logps) AND ref_chosen_logps < 0
                AND ref_rejected_logps < 0 AND chosen_tokens >= 1 AND rejected_tokens >= 1)
        """) == [(0,)]


def test_sql_alone_checks_a_cache_and_reads_every_training_pair(cache: Path, rows: list[ScoredPair]) -> None:
    reader = Reader(cache)
    reader.check()
    columns = "example_key, repeat, prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps"
    found = reader.ask(f"SELECT {columns} FROM ({PAIRS})")
    asked = {row.key: row for row in rows}
    assert sorted(repeat for _, repeat, *_ in found) == [0] * 30 + [1] * 7
    for key, _, prompt_ids, chosen_ids, rejected_ids, chosen, rejected in found:
        row = asked[key]
        assert (chosen, rejected) == (row.ref_chosen_logps, row.ref_rejected_logps)
        assert prompt_ids == row.pair.prompt_ids.tolist()
        assert chosen_ids == row.pair.chosen_ids.tolist()
        assert rejected_ids == row.pair.rejected_ids.tolist()


def test_the_query_in_the_document_is_this_one() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "cache-format.md"
    assert PAIRS.strip() in document.read_text()


@pytest.mark.parametrize("pattern", ["cache.json", "mixtures/train.json", "mixtures/*.parquet", "shards/*.parquet"])
def test_sql_alone_finds_a_flipped_bit(cache: Path, pattern: str) -> None:
    Reader(cache).check()
    path = min(cache.glob(pattern))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    with pytest.raises((AssertionError, duckdb.Error)):
        Reader(cache).check()
