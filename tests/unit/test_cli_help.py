"""What ``--help`` looks like: nothing cut short, options under headings, defaults in one style."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner
from dpo_cache.cli import dpo_cache, dpo_sweep, dpo_train


def help_of(command: click.Command, *arguments: str, width: int = 100) -> str:
    result = CliRunner().invoke(command, [*arguments, "--help"], terminal_width=width)
    assert result.exit_code == 0, result.output
    return result.output


def test_no_line_of_the_list_of_commands_is_cut_short_or_wrapped() -> None:
    listed = help_of(dpo_cache, width=80).partition("Commands:\n")[2].splitlines()
    shown = [name for name, command in dpo_cache.commands.items() if not command.hidden]
    assert [line.split()[0] for line in listed] == sorted(shown)
    assert not [line for line in listed if "..." in line]


def test_options_stand_under_the_headings_of_their_groups() -> None:
    sections = {section.partition(":\n")[0]: section for section in help_of(dpo_train).split("\n\n")}
    assert "--beta FLOAT" in sections["Loss"]
    assert "--learning-rate FLOAT" in sections["Optimization"]
    assert "--config FILE" in sections["Other options"]
    assert list(sections)[-12:-8] == ["Data and output", "Policy", "Adapter (LoRA)", "Loss"]
    assert "Other options" in help_of(dpo_cache, "build")
    assert "Imported values" in help_of(dpo_cache, "import")


@pytest.mark.parametrize("command", [dpo_train, dpo_sweep])
def test_a_default_follows_the_sentence_and_a_default_in_words_looks_like_any_other(command: click.Command) -> None:
    said = re.sub(r"\s+", " ", help_of(command))
    assert re.findall(r"\S \[default", said), "there are some"
    assert not re.findall(r"[^.] \[default", said)
    assert "[default: (" not in said


def test_a_switch_is_shown_by_the_word_that_changes_it_and_a_file_is_overruled_by_the_other() -> None:
    said = help_of(dpo_train)
    assert "  --gradient-checkpointing  " in said
    assert "--no-gradient-checkpointing" not in said
    assert "--hub-private / --no-hub-private" in said
    parsed = dpo_train.make_context("dpo-train", ["--cache", "c", "--output", "o", "--no-gradient-checkpointing"])
    assert parsed.params["gradient_checkpointing"] is False
