"""Score a preference dataset once with the reference model, then train DPO from the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline.cache.cache_folder import ReferenceCache

__version__ = "0.1.0"
__all__ = ["ReferenceCache", "__version__"]


def __getattr__(name: str) -> object:
    """Load what people import from here when they do: ``import dpo_cache`` alone, and ``--help``, stay light."""
    if name == "ReferenceCache":
        from .pipeline.cache.cache_folder import ReferenceCache

        return ReferenceCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
