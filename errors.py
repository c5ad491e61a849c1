"""The one exception a user of this package can cause.

Everything a user can get wrong (a path, a setting, a damaged file) raises :class:`DpoCacheError`, which the
command line prints without a traceback and turns into exit code 1. ``assert`` is left for what only a
programmer can cause.
"""

from __future__ import annotations

import shlex

MAX_QUOTED_CHARACTERS = 300


def first_line(error: BaseException) -> str:
    """What another library's exception says, fit for a message of ours: one line, without its full stop."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0].rstrip(".")[:MAX_QUOTED_CHARACTERS]


def as_argument(value: object) -> str:
    """A path or a name as it is typed in a command: quoted where the shell would take it apart."""
    return shlex.quote(str(value))


class DpoCacheError(Exception):
    """A fault with an explanation: what was found, what was expected, and the next command to type.

    Args:
        found: One sentence: what is wrong, naming the file, field or option and its value.
        expected: What would have been right, where that is not plain from ``found``.
        next_step: What to do now, a command where there is one.
    """

    def __init__(self, found: str, *, expected: str | None = None, next_step: str | None = None) -> None:
        self.found = found
        self.expected = expected
        self.next_step = next_step
        super().__init__(found)

    def located(self, where: str) -> DpoCacheError:
        """The same fault, with the place where it arose in front."""
        return DpoCacheError(f"{where}: {self.found}", expected=self.expected, next_step=self.next_step)

    def to_json(self) -> dict[str, str | None]:
        """What ``DpoCacheError(**…)`` makes the same error of: for another process, and for ``--json``."""
        return {"found": self.found, "expected": self.expected, "next_step": self.next_step}

    def __str__(self) -> str:
        lines = [self.found]
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.next_step is not None:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)
