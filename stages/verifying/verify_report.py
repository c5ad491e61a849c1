"""What a look at every byte of a cache found, for people and for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...errors import as_argument
from ..console.counted_noun import counted
from .rescore_report import RescoreReport

TEXT_WIDTH = 80
MAX_DETAIL_LINES = 5


class FindingKind(StrEnum):
    """What can be wrong with a cache."""

    DAMAGED_CACHE_JSON = "damaged-cache-json"
    STRAY_FILE = "stray-file"
    DAMAGED_SHARD = "damaged-shard"
    FOREIGN_SHARD = "foreign-shard"
    UNUSABLE_SHARD = "unusable-shard"
    WRONG_KEYS = "wrong-keys"
    WRONG_VALUES = "wrong-values"
    MISSING_SHARD = "missing-shard"
    DAMAGED_POINTER = "damaged-pointer"
    DAMAGED_TABLE = "damaged-table"
    BROKEN_MIXTURE = "broken-mixture"


MEANINGS = {
    FindingKind.DAMAGED_CACHE_JSON: "cache.json is not what was written",
    FindingKind.STRAY_FILE: "a file that does not belong here",
    FindingKind.DAMAGED_SHARD: "bytes that are not those the name promises",
    FindingKind.FOREIGN_SHARD: "the values of another reference",
    FindingKind.UNUSABLE_SHARD: "rows, counts or values that cannot be",
    FindingKind.WRONG_KEYS: "keys that are not those of their token ids",
    FindingKind.WRONG_VALUES: "values that the reference does not give",
    FindingKind.MISSING_SHARD: "a mixture names it, and it is not there",
    FindingKind.DAMAGED_POINTER: "a mixture's pointer that cannot be trusted",
    FindingKind.DAMAGED_TABLE: "a mixture's table with other bytes than its name promises",
    FindingKind.BROKEN_MIXTURE: "a mixture that cannot be trained from",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: What kind of thing.
        path: The file, relative to the cache.
        detail: What exactly.
        mixture: The mixture it makes unusable by itself; None where only its shard or file is wrong.
    """

    kind: FindingKind
    path: str
    detail: str
    mixture: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """What was taken away.

    Attributes:
        retired: Mixtures whose pointer was removed; they came first.
        removed: Files removed after that, relative to the cache.
        left: What a person has to look at.
    """

    retired: list[str]
    removed: list[str]
    left: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a look at every byte found.

    Attributes:
        path: The cache.
        shards: Shards that can be relied on.
        pairs: Distinct pairs in them.
        duplicates: Rows that another shard holds too: harmless.
        mixtures: Training pairs of each whole mixture.
        findings: What is wrong.
        rescored: The comparison with the reference, where it was asked for.
        repair: What was taken away, where that was asked for.
    """

    path: Path
    shards: int
    pairs: int
    duplicates: int
    mixtures: dict[str, int]
    findings: list[Finding]
    rescored: RescoreReport | None = None
    repair: Repair | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing wrong is left in the cache."""
        return not self.findings if self.repair is None else not self.repair.left

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {
            "path": str(self.path),
            "sound": self.is_sound,
            "shards": self.shards,
            "pairs": self.pairs,
            "duplicates": self.duplicates,
            "mixtures": self.mixtures,
            "findings": [asdict(finding) for finding in self.findings],
            "rescored": self.rescored.to_json() if self.rescored else None,
            "retired": self.repair.retired if self.repair else None,
            "removed": self.repair.removed if self.repair else None,
        }

    def text(self) -> str:
        """For an 80-column terminal."""
        lines = [f"cache      {self.path}", f"sound      {self.shards} shards with {self.pairs:,} distinct pairs"]
        lines += [f"           mixture {name}: {pairs:,} training pairs" for name, pairs in self.mixtures.items()]
        if self.duplicates:
            lines.append(f"           {self.duplicates:,} rows stand twice (harmless: dpo-cache compact drops them)")
        for finding in self.findings:
            lines += ["", f"{finding.kind}: {MEANINGS[finding.kind]}", finding.path]
            lines += _wrapped(finding.detail)
        if self.rescored:
            lines += ["", self.rescored.text()]
        return "\n".join([*lines, "", *self._closing()])

    def _closing(self) -> Iterator[str]:
        if not self.findings:
            yield "nothing is wrong: every checksum, key, count and value holds"
        elif self.repair is None:
            yield counted(len(self.findings), "finding")
            yield f"next: dpo-cache verify {as_argument(self.path)} --repair"
        else:
            yield f"retired {counted(len(self.repair.retired), 'mixture')}: {', '.join(self.repair.retired) or 'none'}"
            yield f"removed {counted(len(self.repair.removed), 'file')}"
            yield from (f"left for you to look at: {path}" for path in self.repair.left)
            yield "next: run dpo-cache build as before; it scores only what is missing"


def _wrapped(detail: str) -> list[str]:
    """The detail on a few lines; ``--json`` has it whole."""
    return textwrap.wrap(
        detail,
        TEXT_WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        max_lines=MAX_DETAIL_LINES,
        placeholder=" …",
        break_long_words=False,
        break_on_hyphens=False,
    )
