"""The code blocks of README.md and docs/, and what is to be done with each.

A comment on the line before a block, which neither GitHub nor the site shows, says what it needs:

    <!-- gpu -->              it is parsed, not run; so are cluster, hub, network, trl (needs that library)
    <!-- sketch -->           likewise: its names stand for the reader's own
    <!-- file: grid.yaml -->  commands further down read it under this name

Without one a block is run. Blocks of a page are run in order, in one folder.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARSED_ONLY = ("gpu", "cluster", "hub", "network", "trl", "sketch")
RUN = ("bash", "python", "sql")
DATA = ("json", "yaml")
PROSE = ("", "text")
PROGRAMS = ("dpo-cache", "dpo-train", "dpo-sweep", "dpo-report")
LAUNCHERS = ("torchrun", "deepspeed", "srun", "exec", "time", "timeout")
_FENCE = re.compile(r"(?P<indent> *)(?P<fence>```+)(?P<info>.*)")
_MARK = re.compile(r" *<!-- (?P<word>[a-z]+)(: (?P<name>\S+))? -->")
_REDIRECTION = re.compile(r"\d?>{1,2}(&\d| ?[^\s>|;&]+)")
_PLACEHOLDER = re.compile(r"…|\$\{\w+\}|\$\w+")
_ASSIGNMENT = re.compile(r"\w+=")
_HEREDOC = re.compile(r"<<-?'?(?P<end>\w+)'?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One code block.

    Attributes:
        page: The file, relative to the checkout.
        line: Where its code begins, from 1.
        language: The word after the fence.
        text: The code.
        mark: Why it is parsed only, or None.
        file: Under which name other blocks read it, or None.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str | None
    file: str | None

    @property
    def place(self) -> str:
        """For messages, ``docs/training.md:12``."""
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether running the page runs this block."""
        return self.mark is None and self.language in RUN


def pages() -> list[Path]:
    """README.md and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    return list(_blocks(page, page.read_text(encoding="utf-8").splitlines()))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        fence = _FENCE.fullmatch(lines[number])
        if fence is None:
            number += 1
            continue
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == fence["fence"])
        mark = _MARK.fullmatch(lines[number - 1]) if number else None
        indent = len(fence["indent"])
        yield Block(
            page=str(page.relative_to(ROOT)),
            line=number + 2,
            language=fence["info"].strip(),
            text="\n".join(line[indent:] for line in lines[number + 1 : end]) + "\n",
            mark=mark["word"] if mark and mark["word"] != "file" else None,
            file=mark["name"] if mark and mark["word"] == "file" else None,
        )
        number = end + 1


def our_commands(script: str) -> Iterator[tuple[str, list[str]]]:
    """Each of our programs that a shell script starts, with its arguments, placeholders filled in.

    Whatever starts it (torchrun, srun, an assignment of a variable) is left away.
    """
    for command in _simple_commands(script):
        words = list(itertools.dropwhile(_ASSIGNMENT.match, command))
        if words and words[0] in LAUNCHERS:
            words = list(itertools.dropwhile(lambda word: word not in PROGRAMS, words))
        if words and words[0] in PROGRAMS:
            yield words[0], [_PLACEHOLDER.sub("1", argument) for argument in words[1:]]


def _simple_commands(script: str) -> Iterator[list[str]]:
    pending, heredoc_end = "", None
    for line in script.replace("\\\n", " ").splitlines():
        if heredoc_end is not None:
            heredoc_end = None if line == heredoc_end else heredoc_end
            continue
        pending += _REDIRECTION.sub(" ", line) + "\n"
        try:
            words = _words(pending)
        except ValueError:  # a quotation goes on in the next line
            continue
        heredoc = _HEREDOC.search(pending)
        heredoc_end = heredoc["end"] if heredoc else None
        pending = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();|&<>"):
                yield command
                command = []
            else:
                command.append(word)


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)
