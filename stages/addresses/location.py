"""Where a cache lies: in a folder here, or at an address that can be read."""

from __future__ import annotations

import re
from pathlib import Path

from ...pipeline.data.named_path import named_path

Location = Path | str
"""A folder, or the address of one as text: ``hf://datasets/ORG/NAME``, ``s3://BUCKET/PATH``, ``https://…``."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_address(location: Location) -> bool:
    """Whether it begins with a protocol. A path never does: two slashes in it are one."""
    return isinstance(location, str) and _ADDRESS.match(location) is not None


def location_of(text: str) -> Location:
    """What a person meant: an address as it was written, anything else as a path."""
    return text if is_address(text) else named_path(text)


def hub_address(repo_id: str, revision: str | None) -> str:
    """The address of a dataset repository on the Hub, at a branch, tag or commit; None for its main branch."""
    return f"hf://datasets/{repo_id}" + (f"@{revision.replace('/', '%2F')}" if revision else "")
