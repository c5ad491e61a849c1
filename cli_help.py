"""How ``--help`` shows options: under the headings of their groups, with their defaults in one style."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import click

from .stages.names_elsewhere import instead_of

OTHER = "Other options"


class GroupedOption(click.Option):
    """An option that stands under a heading of its own.

    Args:
        group: The heading.
        default_text: What stands behind ``default:`` where the value itself does not say it.
        **attributes: As click takes them.
    """

    def __init__(self, *names: Any, group: str, default_text: str | None = None, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group = group
        self._default_text = default_text

    def get_help_extra(self, ctx: click.Context) -> Any:
        """With the default in words, where it is declared so."""
        extra = super().get_help_extra(ctx)
        if self._default_text is not None:
            extra["default"] = self._default_text
        return extra

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """A switch that is off by default is shown as the word that turns it on; ``--no-…`` is there for files."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts or self.default:
            return record
        return self.opts[0], record[1]


class GroupedCommand(click.Command):
    """A command whose help has a section for each group of options, in the order they are declared."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; an option of another trainer is refused with what to do instead, not with similar words."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as unknown:
            instead = instead_of(unknown.option_name)
            if instead is None:
                raise
            raise click.UsageError(f"No such option '{unknown.option_name}': {instead}.", ctx) from unknown

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections; what belongs to none comes last."""
        sections: dict[str, list[tuple[str, str]]] = defaultdict(list)
        others: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                (sections[parameter.group] if isinstance(parameter, GroupedOption) else others).append(record)
        for heading, records in [*sections.items(), (OTHER if sections else "Options", others)]:
            with formatter.section(heading):
                formatter.write_dl(records)
