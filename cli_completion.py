"""What a shell needs to complete our commands, and values that only a cache knows."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str) -> str:
    """Code for a shell to source: completion of every console script of this package."""
    completion = get_completion_class(shell)
    assert completion is not None, f"click completes nothing in {shell}"
    scripts = [
        script.name for script in metadata.distribution("dpo-cache").entry_points.select(group="console_scripts")
    ]
    return "\n".join(
        completion(click.Command(name), {}, name, f"_{name}_COMPLETE".replace("-", "_").upper()).source()
        for name in sorted(scripts)
    )


def complete_mixture(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The mixtures of the cache that stands on the command line already."""
    # An argument is not assigned yet where an option without its value follows: then it is left over.
    cache = context.params.get("cache") or next(iter(context.args), None)
    if cache is None:
        return []
    names = sorted(pointer.stem for pointer in (Path(cache) / "mixtures").glob("*.json"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
