"""The key of a pair: a digest of exactly the token ids and mask that were scored.

All integers are little-endian. An array is its number of entries as an unsigned 64-bit integer, then its
entries: token ids as signed 32-bit integers, the mask as one byte (0 or 1) a token.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from ..data.token_pair import TokenIds, TokenPair, canonical_scored_mask

KEY_VERSION = 1
KEY_BYTES = 32
MAX_NAMED_KEYS = 10

Keys = npt.NDArray[np.bytes_]
"""Keys as numpy ``S32``: compares and sorts as the bytes do. Taking one out drops trailing zero bytes; use
:func:`key_at`."""


def example_key(pair: TokenPair) -> bytes:
    """SHA-256 over a version byte and the length-prefixed prompt, chosen and rejected ids and scored mask.

    The common mask (no prompt token, every completion token) is written as an empty array, so that a pair that
    spells it out has the same key as one that does not.
    """
    digest = hashlib.sha256(bytes([KEY_VERSION]))
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        digest.update(_length(ids))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").data)
    mask = canonical_scored_mask(pair)
    if mask is None:
        digest.update(bytes(8))
    else:
        digest.update(_length(mask))
        digest.update(np.ascontiguousarray(mask, dtype=np.bool_).data)
    return digest.digest()


def prompt_hash(prompt_ids: TokenIds) -> bytes:
    """SHA-256 over a version byte and the prompt's ids: what puts pairs of one prompt side by side."""
    return hashlib.sha256(
        bytes([KEY_VERSION]) + _length(prompt_ids) + np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes()
    ).digest()


def prompt_hash_prefix(prompt_ids: TokenIds) -> int:
    """The first 8 bytes of :func:`prompt_hash` as a big-endian number: same order, cheap to sort and to store."""
    return int.from_bytes(prompt_hash(prompt_ids)[:8], "big")


def key_at(keys: Keys, index: int) -> bytes:
    """One key of an array, its trailing zero bytes included."""
    return bytes(keys[index]).ljust(KEY_BYTES, b"\0")


def keys_array(keys: list[bytes]) -> Keys:
    """Keys of 32 bytes each as one array."""
    return np.frombuffer(b"".join(keys), dtype=f"S{KEY_BYTES}")


def name_keys(keys: Keys) -> str:
    """The first few keys in hex, for a message."""
    named = ", ".join(key_at(keys, index).hex() for index in range(min(len(keys), MAX_NAMED_KEYS)))
    return named + (", …" if len(keys) > MAX_NAMED_KEYS else "")


def _length(array: npt.NDArray[np.generic]) -> bytes:
    return len(array).to_bytes(8, "little")
