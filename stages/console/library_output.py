"""What libraries print while we work: what people who score and train have no use for is turned off."""

from __future__ import annotations

import logging
import os
import sys


def quiet_libraries() -> None:
    """Call it before DeepSpeed or datasets is imported.

    The bars of transformers and datasets go: ours is the one that tells how far the job is. So does what datasets logs
    about a file that it then raises an error for, and DeepSpeed's warning that it found no accelerator, where there is
    none.
    """
    import torch
    import transformers

    # Looked at once, on import: training never imports datasets, which would take a second and 80 MB.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
        sys.modules["datasets"].logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # looked at once, on import
