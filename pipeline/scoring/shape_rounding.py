"""Few different shapes instead of many: numbers of tokens are rounded up before they become rows of a product.

oneDNN compiles a kernel for every new number of rows and keeps it for the life of the process: a CPU loses more time
and memory to that than to the padding. A GPU reads a mask as it is only where its rows are a multiple of 8.
"""

from __future__ import annotations

ROW_MULTIPLE = 32


def rounded_up(tokens: int, multiple: int = ROW_MULTIPLE) -> int:
    """The next multiple."""
    return -(-tokens // multiple) * multiple
