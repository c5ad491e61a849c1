"""Folders and addresses on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .pipeline.data.named_path import named_path
from .pipeline.data.printable_text import printable
from .stages.addresses.location import is_address


class _Folder(click.Path):
    """A path. It would take the address ``s3://bucket/x`` for one in a folder named ``s3:``."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty", parameter, context)
        if is_address(value):
            self.fail(
                f"{value} is an address, and addresses are read-only: name a folder "
                f"(dpo-cache pull {value} DIR makes one of a cache)",
                parameter,
                context,
            )
        path = named_path(value)  # YAML, and `--cache=~/x`, leave the tilde
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            self.fail(f"the path of {printable(str(path))} is not UTF-8: rename it", parameter, context)
        return super().convert(path, parameter, context)


FOLDER = _Folder(path_type=Path)
FILE = _Folder(path_type=Path, dir_okay=False)


class _Location(click.Path):
    """A path, or an address, which stays text."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return value if is_address(value) else FOLDER.convert(value, parameter, context)


LOCATION = _Location(path_type=Path)
