"""A user with a number and no name, as containers have."""

from __future__ import annotations

import pwd

import pytest


def leave_without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the variables nor the table of users name a home folder."""

    def unknown(number: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
