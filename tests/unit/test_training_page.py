"""``docs/training.md`` says of losses what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dpo_cache.pipeline.training.objective import F_DIVERGENCES, LOSS_TRAITS
from dpo_cache.pipeline.training.preference_loss import LOSSES

PAGE = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")


def _rows(heading: str) -> dict[str, list[str]]:
    """Rows of the table below a heading, by the names in backticks in their first cell."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        for name in re.findall(r"`([^`]+)`", cells[0]) if line.strip().startswith("|") else ():
            rows[name] = cells[1:]
    return rows


def test_every_loss_stands_in_the_table_with_its_traits() -> None:
    rows = _rows("Losses")
    del rows["--loss"]
    assert rows.keys() == LOSS_TRAITS.keys()
    for name, (_, beta, smoothing, divergence, source) in rows.items():
        traits = LOSS_TRAITS[name]
        assert float(beta) == traits.default_beta, name
        expected = "yes" if traits.smooths_labels else ""
        assert smoothing == (f"{traits.default_label_smoothing:g}" if traits.default_label_smoothing else expected)
        assert divergence == ("yes" if traits.takes_f_divergence else ""), name
        assert source, name


@pytest.mark.parametrize("name", LOSSES)
def test_every_equation_names_its_paper(name: str) -> None:
    documented = LOSSES[name].__doc__ or ""
    assert "``" in documented
    assert re.search(r"arXiv \d{4}\.\d{5}", documented), name


def test_every_divergence_stands_in_a_table() -> None:
    assert set(F_DIVERGENCES) <= _rows("Options of a loss").keys()
