"""The proof before the first update: made by a fresh run, read back by a resumed one."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...pipeline.training.run_file import read_run_json, write_run_file, write_run_json
from ...pipeline.training.step_zero import StepZeroFigures, check_step_zero
from ..processes.process_group import decided_by_first, say_once
from .prepared_run import PreparedRun
from .started_run import StartedRun


def prove_step_zero(run: PreparedRun, started: StartedRun) -> StepZeroFigures | None:
    """Measure how far policy and cache are apart before the first update; a resumed run reads its record. Collective.

    Returns:
        The figures, the same on all ranks; None for a resumed run whose record is gone.

    Raises:
        DpoCacheError: A policy that is the reference does not give the cached values back; on all ranks alike.
    """
    record = run.config.output / "step0.json"
    checkpoint = started.checkpoint
    if checkpoint is not None:
        return decided_by_first(lambda: inherited_figures(checkpoint.run_folder, record))
    figures = started.loop.prove_step_zero()
    if run.is_main:
        write_run_json(record, {**asdict(figures), **_what_was_compared(run)})
    if run.origin.is_reference and not run.config.allow_numerics_mismatch:
        check_step_zero(figures)
    if figures.within_bound:
        say_once(f"{figures.summary()}; its loss is {figures.loss:.6f}")
    else:
        allowed = "--allow-numerics-mismatch" if run.origin.is_reference else "--allow-other-policy"
        say_once(f"warning: {figures.summary()}; the run goes on, because {allowed} was given")
    return figures


def _what_was_compared(run: PreparedRun) -> dict[str, Any]:
    """With it, the record says by itself which reference, pairs and policy its figures are of."""
    recipe, origin = run.recipe, run.origin
    return {
        "reference_id": recipe.reference_id,
        "mixture_digest": recipe.mixture_digest,
        "policy_sha256": origin.sha256,
        "policy_is_reference": origin.is_reference,
        "attention": recipe.attention,
    }


def inherited_figures(begun_in: Path, record: Path) -> StepZeroFigures | None:
    """The figures of the run that is continued; None where its record is gone.

    A run may go on in another folder, which gets the record too: what counts as a tie depends on it.

    Args:
        begun_in: The folder of the run that saved the checkpoint.
        record: Where the record belongs in the folder of this run.
    """
    begun = begun_in / record.name
    if begun.exists() and begun.resolve() != record.resolve():
        write_run_file(record, begun.read_text(encoding="utf-8"))
    return recorded_figures(record)


def recorded_figures(record: Path) -> StepZeroFigures | None:
    """The figures of a record; None where the file is gone."""
    if not record.exists():
        return None
    recorded = read_run_json(record)
    figures = {field.name: recorded[field.name] for field in fields(StepZeroFigures)}
    # JSON knows no NaN. Only the expected loss may be absent.
    known: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in figures.items() if name != "expected_loss"
    }
    return StepZeroFigures(**known, expected_loss=figures["expected_loss"])
