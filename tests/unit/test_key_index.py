"""Every key is found where it lies, and a key in several shards always in the same one."""

from __future__ import annotations

from dpo_cache.pipeline.cache.example_key import key_at, keys_array
from dpo_cache.pipeline.cache.key_index import KeyIndex, build_key_index
from dpo_cache.pipeline.cache.shard_file import ShardRef
from hypothesis import given
from hypothesis import strategies as st

# Few distinct keys, trailing and leading zeros among them, so that shards share some.
KEYS = st.integers(0, 40).map(lambda number: bytes(30) + bytes([number % 7, number // 7]))
SHARDS = st.lists(st.lists(KEYS, min_size=1, max_size=12, unique=True), max_size=6)


def index_of(shards: list[list[bytes]]) -> KeyIndex:
    refs = [
        ShardRef(sha256=f"{97 * number % 256:064x}", num_rows=len(keys), num_bytes=1)
        for number, keys in enumerate(shards)
    ]
    return build_key_index([(ref, keys_array(keys)) for ref, keys in zip(refs, shards, strict=True)])


@given(SHARDS, st.lists(KEYS, min_size=1))
def test_a_key_is_found_in_the_shard_of_lowest_digest_that_holds_it(
    shards: list[list[bytes]], asked: list[bytes]
) -> None:
    index = index_of(shards)
    expected: dict[bytes, tuple[str, int]] = {}
    for number, keys in enumerate(shards):
        for row, key in enumerate(keys):
            place = (f"{97 * number % 256:064x}", row)
            expected[key] = min(expected.get(key, place), place)
    assert len(index) == len(expected)
    assert index.num_duplicates == sum(map(len, shards)) - len(expected)
    assert [key_at(index.keys, place) for place in range(len(index))] == sorted(expected)
    for key, place in zip(asked, index.find(keys_array(asked)), strict=True):
        assert (place >= 0) == (key in expected)
        if place >= 0:
            assert (index.shards[index.shard_numbers[place]].sha256, int(index.rows[place])) == expected[key]


def test_rows_with_values_per_token_count_before_those_without() -> None:
    refs = [ShardRef(sha256=f"{number:064x}", num_rows=1, num_bytes=1) for number in range(4)]
    entries = [(ref, keys_array([b"x" * 32])) for ref in refs]
    index = build_key_index(entries, with_token_logps={refs[2].sha256, refs[3].sha256})
    assert index.shards[index.shard_numbers[0]] == refs[2]
    assert index.has_token_logps.tolist() == [True, True, False, False]
    assert index.num_duplicates == 3


def test_the_index_does_not_depend_on_the_order_of_the_shards() -> None:
    refs = [ShardRef(sha256=f"{number:064x}", num_rows=2, num_bytes=1) for number in range(3)]
    keys = [keys_array([bytes([number]) * 32, b"x" * 32]) for number in range(3)]
    entries = list(zip(refs, keys, strict=True))
    one, other = build_key_index(entries), build_key_index(entries[::-1])
    assert (one.rows == other.rows).all()
    assert (one.shard_numbers == other.shard_numbers).all()
    assert one.shards == other.shards
