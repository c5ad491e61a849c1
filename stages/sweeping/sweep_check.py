"""Whether every point of a sweep can use its cache: checked before anything is built or trained, axis by axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.reference_identity import ReferenceIdentity, differences
from ..addresses.local_copy import glance
from ..building.build_reference import resolve_reference
from ..hub.model_folder import find_model_folder
from ..training.policy import check_policy, find_policy
from ..training.recipe import refuse_other_numerics
from ..training.train_config import TrainConfig
from .sweep_grid import SweepGrid, SweepPoint, value_text


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheProspect:
    """The cache as the points will find it: as it is, with what the builds add to it.

    Attributes:
        identity: Its reference.
        mixtures: Names of the mixtures that it has or gets.
        cache: What the cache says of its reference; None before its first build.
    """

    identity: ReferenceIdentity
    mixtures: Collection[str]
    cache: ReferenceCache | None


def expected_cache(grid: SweepGrid) -> CacheProspect:
    """Look at the cache that is there, or at the reference it will be built with; no weights are loaded.

    Raises:
        DpoCacheError: There is neither a cache nor a build, or the reference cannot be found.
    """
    if len({build.mixture for build in grid.builds}) < len(grid.builds):
        raise DpoCacheError(
            "two builds make the same mixture", expected="one build per mixture; `dataset` may be a list of datasets"
        )
    references = {build.mixture: resolve_reference(build).identity for build in grid.builds}
    cache, mixtures = None, set(references)
    if not references or (Path(grid.cache) / "cache.json").exists():
        with glance(grid.cache) as folder:
            cache = ReferenceCache.open(folder)
            mixtures.update(cache.mixture_names())
    identity = cache.identity if cache else next(iter(references.values()))
    for mixture, theirs in references.items():
        different = ", ".join(name for name, _, _ in differences(identity, theirs))
        if different:
            raise DpoCacheError(
                f"the build of mixture {mixture} has another reference than the cache {grid.cache} ({different})",
                expected="one reference for all builds, that of the cache",
                next_step="give each reference its own cache and sweep",
            )
    return CacheProspect(identity=identity, mixtures=mixtures, cache=cache)


def check_points(points: Sequence[SweepPoint], prospect: CacheProspect) -> None:
    """Refuse a sweep with a point that cannot train from the cache.

    Raises:
        DpoCacheError: Naming every axis that cannot, its values, and why.
    """
    checks: list[tuple[tuple[str, ...], Callable[[TrainConfig], None]]] = [
        (("mixture",), lambda config: _require_mixture(config.mixture, prospect)),
        (("eval_mixture",), lambda config: _require_mixture(config.eval_mixture, prospect)),
        (
            ("dtype", "attn_implementation", "use_qlora", "allow_numerics_mismatch"),
            lambda config: refuse_other_numerics(config, prospect.identity),
        ),
        (("model", "model_revision", "allow_other_policy"), lambda config: _require_reference(config, prospect)),
    ]
    faults = [fault for names, check in checks for fault in _faults_by_axis(points, names, check)]
    if faults:
        raise DpoCacheError(
            "\n".join(fault.found for fault in faults),
            expected="points that can all use this cache",
            next_step="\n        ".join(dict.fromkeys(fault.next_step for fault in faults if fault.next_step)),
        )


def _faults_by_axis(
    points: Sequence[SweepPoint], names: tuple[str, ...], check: Callable[[TrainConfig], None]
) -> list[DpoCacheError]:
    """What each distinct setting of these options comes to; points that are alike in them are asked about once."""
    faults: dict[tuple[object, ...], DpoCacheError] = {}
    asked: set[tuple[object, ...]] = set()
    for point in points:
        values = tuple(getattr(point.config, name) for name in names)
        if values in asked:
            continue
        asked.add(values)
        try:
            check(point.config)
        except DpoCacheError as fault:
            faults[values] = _named(fault, [name for name in names if name in point.options], point)
    return list(faults.values())


def _named(fault: DpoCacheError, axes: Sequence[str], point: SweepPoint) -> DpoCacheError:
    if not axes:
        return fault
    at = ", ".join(f"{axis} = {value_text(point.options[axis])}" for axis in axes)
    next_step = f"remove {axes[0]} from the points, and give each of its values its own sweep and cache"
    return DpoCacheError(
        f"the cache cannot serve the axis {' and '.join(axes)}: at {at}, {fault.found}",
        next_step=f"{next_step}; or: {fault.next_step}" if fault.next_step else next_step,
    )


def _require_mixture(name: str | None, prospect: CacheProspect) -> None:
    if name is not None and name not in prospect.mixtures:
        raise DpoCacheError(
            f"the cache has no mixture {name!r}, and no build makes it (there are: "
            f"{', '.join(sorted(prospect.mixtures)) or 'none'})",
            next_step=f"add a build with `mixture: {name}` and its dataset under build:",
        )


def _require_reference(config: TrainConfig, prospect: CacheProspect) -> None:
    if prospect.cache is not None:
        check_policy(config, prospect.identity, find_policy(config, prospect.cache))
    elif config.model is not None:
        check_policy(config, prospect.identity, find_model_folder(config.model, config.model_revision))
