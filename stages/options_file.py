"""A YAML file of options in which every key stands once: of one that stands twice, YAML's reader drops the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import DpoCacheError


def read_options_file(path: Path) -> Any:
    """What a file of options holds.

    Raises:
        DpoCacheError: It cannot be read, is not YAML, or has a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as fault:
        raise DpoCacheError(f"{path} is not YAML: {fault}") from fault
    except DpoCacheError as fault:
        raise fault.located(str(path)) from fault


class _EachKeyOnce(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise DpoCacheError(
                    f"{key.value} is given twice, in lines {lines[key.value]} and {line}",
                    next_step="leave out one of the two; an option that takes several values takes a list of them",
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep=deep)
