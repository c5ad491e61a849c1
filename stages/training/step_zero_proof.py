"""The proof before the first update: made by a fresh run, read back by a resumed one."""

from __future__ import annotations

from ...pipeline.training.step_zero import StepZeroFigures, check_step_zero, read_step_zero, write_step_zero
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
    if started.checkpoint is not None:
        return decided_by_first(lambda: read_step_zero(record))
    figures = started.loop.prove_step_zero()
    if run.is_main:
        write_step_zero(record, figures)
    if run.origin.is_reference and not run.config.allow_numerics_mismatch:
        check_step_zero(figures)
    elif not figures.within_bound:
        allowed = "--allow-numerics-mismatch" if run.origin.is_reference else "--allow-other-policy"
        say_once(f"warning: {figures.summary()}; the run goes on, because {allowed} was given")
    return figures
