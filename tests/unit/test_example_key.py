"""The key is a function of exactly the ids and mask that were scored."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from dpo_cache.pipeline.cache.example_key import example_key, key_at, keys_array, prompt_hash, prompt_hash_prefix
from dpo_cache.pipeline.data.token_pair import TokenPair
from hypothesis import given
from hypothesis import strategies as st

# SHA-256 of bytes packed by hand (struct), not by the code under test.
GOLDEN_PLAIN = "96181fda4d544bf69f460f325e03b8d0a70293b15a2aaed4fa008f6279c701ce"
GOLDEN_MASKED = "6ade9d91d8f649dcf9fc08708e766082038f0bb324da5335d4d43bfb27ccff63"
GOLDEN_PROMPT = "0961b1953ad011b428030f4064cc7e7947502e2ddb67322c8796333006a2223f"

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int], mask: list[bool] | None = None) -> TokenPair:
    return TokenPair(
        prompt_ids=np.array(prompt, dtype=np.int32),
        chosen_ids=np.array(chosen, dtype=np.int32),
        rejected_ids=np.array(rejected, dtype=np.int32),
        scored_mask=None if mask is None else np.array(mask),
    )


def test_golden_keys() -> None:
    """Changing these digests makes every existing cache useless: it is a new key version."""
    assert example_key(pair_of([1, 2, 3], [4, 5], [6])).hex() == GOLDEN_PLAIN
    assert example_key(pair_of([1, 2], [4, 5], [6], [False, True, True, False, True])).hex() == GOLDEN_MASKED
    assert prompt_hash(np.array([1, 2, 3], dtype=np.int32)).hex() == GOLDEN_PROMPT


@given(IDS, IDS, IDS)
def test_the_key_is_the_digest_that_the_format_describes(a: list[int], b: list[int], c: list[int]) -> None:
    content = b"\x01"
    for ids in (a, b, c):
        content += struct.pack(f"<Q{len(ids)}i", len(ids), *ids)
    assert example_key(pair_of(a, b, c)) == hashlib.sha256(content + struct.pack("<Q", 0)).digest()
    mask = [False] * len(a) + [True] * len(b) + [False] * len(c)
    masked = content + struct.pack("<Q", len(mask)) + bytes(mask)
    assert example_key(pair_of(a, b, c, mask)) == hashlib.sha256(masked).digest()


@given(IDS, IDS, IDS)
def test_a_mask_that_says_what_none_says_makes_no_other_key(a: list[int], b: list[int], c: list[int]) -> None:
    mask = [False] * len(a) + [True] * (len(b) + len(c))
    assert example_key(pair_of(a, b, c, mask)) == example_key(pair_of(a, b, c))


@given(IDS, IDS, IDS, st.data())
def test_any_change_of_a_token_or_of_the_mask_makes_another_key(
    a: list[int], b: list[int], c: list[int], data: st.DataObject
) -> None:
    parts = [a, b, c]
    key = example_key(pair_of(a, b, c))
    part = data.draw(st.integers(0, 2))
    place = data.draw(st.integers(0, len(parts[part]) - 1))
    changed = [list(ids) for ids in parts]
    changed[part][place] ^= 1
    assert example_key(pair_of(changed[0], changed[1], changed[2])) != key
    mask = [False] * len(a) + [True] * (len(b) + len(c))
    flipped = data.draw(st.integers(0, len(mask) - 1))
    mask[flipped] = not mask[flipped]
    assert example_key(pair_of(a, b, c, mask)) != key


def test_where_one_part_ends_and_the_next_begins_counts() -> None:
    splits = [([1], [2, 3], [4]), ([1, 2], [3], [4]), ([1], [2], [3, 4])]
    assert len({example_key(pair_of(*split)) for split in splits}) == 3
    assert example_key(pair_of([1], [2], [3])) != example_key(pair_of([1], [3], [2]))


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20))
def test_arrays_of_keys_sort_and_come_out_as_the_bytes_do_trailing_zeros_included(keys: list[bytes]) -> None:
    keys += [b"\0" * 32, b"\xff" + b"\0" * 31]
    array = keys_array(keys)
    assert [key_at(array, index) for index in range(len(keys))] == keys
    ordered = np.sort(array)
    assert [key_at(ordered, index) for index in range(len(keys))] == sorted(keys)


def test_the_prefix_of_a_prompt_hash_orders_like_the_hash() -> None:
    prompts = [np.array([number], dtype=np.int32) for number in range(50)]
    assert sorted(range(50), key=lambda i: prompt_hash_prefix(prompts[i])) == sorted(
        range(50), key=lambda i: prompt_hash(prompts[i])
    )
