"""The columns of a file that TRL's DPOTrainer trains on."""

from __future__ import annotations

import pyarrow as pa

TRL_SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
    ]
)
REFERENCE_ID_KEY = "dpo_cache.reference_id"
"""Key of the file's metadata under which it says whose values it holds."""
