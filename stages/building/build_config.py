"""The settings of ``dpo-cache build``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from ...errors import DpoCacheError
from ...pipeline.data.tokenization_settings import MaskChoice, Truncation
from ...pipeline.scoring.attention_names import ATTENTION_KERNELS
from ..setting import check_settings, refuse_ignored, setting

for_reference = partial(setting, group="Reference")
for_data = partial(setting, group="Data")
for_tokens = partial(setting, group="Tokens")
for_cache = partial(setting, group="Cache")
for_memory = partial(setting, group="Memory and GPUs")
for_trial = partial(setting, group="Before a build")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What to score, with which reference, into which cache."""

    model: str = for_reference(
        help="The reference model: a folder with safetensors weights, or a Hub id.", metavar="PATH_OR_ID"
    )
    model_revision: str | None = for_reference(None, help="Revision of --model on the Hub.")
    adapter: str | None = for_reference(
        None, help="A peft adapter on top of the model: a folder or a Hub id.", metavar="PATH_OR_ID"
    )
    adapter_revision: str | None = for_reference(None, help="Revision of --adapter on the Hub.")
    quantization: str | None = for_reference(
        None, help="Quantize the model's weights, for `dpo-train --use-qlora`.", choices=("nf4",)
    )
    dtype: str | None = for_reference(
        None,
        help="Precision of weights and forward passes.",
        default_text="bfloat16 on a GPU, float32 on a CPU",
        choices=("float32", "bfloat16", "float16"),
    )
    attn_implementation: str | None = for_reference(
        None,
        help="Attention kernel.",
        default_text="flex_attention on a GPU where both GPU and model are known to run it; otherwise sdpa, or eager "
        "where the architecture has no other",
        choices=ATTENTION_KERNELS,
    )
    trust_remote_code: bool = for_reference(False, help="Run Python code that comes with the model or the tokenizer.")

    dataset: tuple[str, ...] = for_data(
        help="Preference pairs: PATH_OR_ID[,split=…][,config=…][,revision=…][,amount=…]. May be repeated. amount=0.5 "
        "takes half the rows, amount=1000 takes 1,000; asking for more than exist repeats rows.",
        metavar="SPEC",
    )
    max_unusable_share: float = for_data(
        0.1,
        help="Fail if more than this share of the rows is unusable.",
        minimum=0.0,
        maximum=1.0,
    )
    verbose: bool = for_data(False, help="List the row numbers of all unusable rows.")

    tokenizer: str | None = for_tokens(None, help="Tokenizer: a folder or a Hub id.", default_text="the model's")
    chat_template: str | None = for_tokens(
        None,
        help="Chat template: a file, or the name of a built-in one.",
        default_text="the tokenizer's own",
        metavar="FILE_OR_NAME",
    )
    max_seq_length: int = for_tokens(2048, help="Longest prompt plus response, in tokens.", minimum=2)
    truncation: Truncation = for_tokens(
        "drop",
        help="What to do with longer pairs.",
        choices=get_args(Truncation),
    )
    mask: MaskChoice = for_tokens(
        "last-turn",
        help="Which assistant turns are scored: the last; all from the first message in which chosen and rejected "
        "differ; or all. The two open-instruct masks reproduce its masking token by token: "
        "open-instruct-all-turns until 2025-06-26 (Tülu 3, OLMo 2), open-instruct-last-turn from then until "
        "2026-07-24 (OLMo 3). Since then, open-instruct scores what last-turn scores.",
        choices=get_args(MaskChoice),
    )

    cache: Path = for_cache(help="Folder of the cache; created if it does not exist.")
    mixture: str = for_cache("train", help="Name of these pairs in the cache.")
    replace: bool = for_cache(False, help="Replace the mixture if it already has other pairs.")
    extend: bool = for_cache(False, help="Add these pairs to the mixture if it already exists.")
    token_logps: bool = for_cache(
        False, help="Also store the log-probability of each scored token; pairs cached without them are scored again."
    )
    drop_nonfinite: bool = for_cache(
        False,
        help="Leave out pairs whose reference log-probability is not finite, or exactly 0, instead of failing.",
    )

    num_workers: int | None = for_memory(
        None, help="Scoring processes.", default_text="one per GPU; one on a CPU", minimum=1
    )
    tokens_per_batch: int | None = for_memory(
        None,
        help="Tokens in one forward pass; a longer pair is scored alone. Halved when memory runs out.",
        default_text="set from the GPU's free memory; 8192 on a CPU",
        minimum=1,
    )
    zero_stage: int = for_memory(
        0,
        help="0: every process holds the whole reference; 3: it is partitioned across all scoring processes.",
        minimum=0,
        maximum=3,
    )

    dry_run: bool = for_trial(
        False, help="Report what would be scored and what reused, without loading the model or writing anything."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.dataset:
            raise DpoCacheError("no --dataset is given", expected="one or more")
        if self.zero_stage not in (0, 3):
            raise DpoCacheError(f"--zero-stage is {self.zero_stage}", expected="0 or 3")
        refuse_ignored(self, "adapter_revision", without="--adapter", is_given=bool(self.adapter))
        if self.quantization and self.zero_stage:
            raise DpoCacheError(
                f"--quantization {self.quantization} is given with --zero-stage {self.zero_stage}, which cannot "
                "partition quantized weights",
                next_step="leave out --zero-stage: the quantized model takes about a quarter of the memory",
            )
        if self.quantization and self.adapter:
            raise DpoCacheError(
                f"--quantization {self.quantization} is given with --adapter, and no policy could start from the two",
                expected="a whole model",
                next_step="merge the adapter into its base (peft's merge_and_unload) and name the result as --model",
            )
        if self.replace and self.extend:
            raise DpoCacheError("--replace and --extend are given together", expected="one of them")
