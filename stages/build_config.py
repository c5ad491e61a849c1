"""The settings of ``dpo-cache build``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DpoCacheError
from .setting import check_settings, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What to score, with which reference, into which cache."""

    model: str = setting(help="The reference: a folder with safetensors weights, or a Hub id.", metavar="PATH_OR_ID")
    dataset: tuple[str, ...] = setting(
        help="Preference pairs: PATH_OR_ID[,split=…][,config=…][,revision=…][,amount=…]; may be repeated. "
        "AMOUNT is a fraction with a dot or a count; beyond the dataset's size it repeats rows.",
        metavar="SPEC",
    )
    cache: Path = setting(help="Folder of the cache; created if there is none.")
    mixture: str = setting("train", help="Name under which training finds these pairs in the cache.")
    replace: bool = setting(False, help="Let the mixture of this name now mean these pairs.")
    extend: bool = setting(False, help="Add to the mixture of this name the rows that it does not have yet.")

    model_revision: str | None = setting(None, help="Revision of a model on the Hub.")
    adapter: str | None = setting(
        None, help="A peft adapter on top of the model: a folder or a Hub id.", metavar="PATH_OR_ID"
    )
    adapter_revision: str | None = setting(None, help="Revision of an adapter on the Hub.")
    tokenizer: str | None = setting(None, help="Tokenizer folder or Hub id [default: the model's].")
    chat_template: str | None = setting(
        None, help="Template file, or a pinned name [default: the tokenizer's own].", metavar="FILE_OR_NAME"
    )
    max_seq_length: int = setting(2048, help="Longest prompt plus answer, in tokens.", minimum=2)
    truncation: str = setting(
        "drop",
        help="What happens to a pair that is longer.",
        choices=("drop", "truncate-prompt-left", "truncate-response-right"),
    )
    mask: str = setting(
        "last-turn",
        help="Which assistant turns are scored; token by token as open-instruct did with open-instruct-all-turns "
        "(Tülu 3, OLMo 2: until 2025-06-26) and open-instruct-last-turn (OLMo 3).",
        choices=("last-turn", "all-turns", "open-instruct-last-turn", "open-instruct-all-turns"),
    )
    max_unusable_share: float = setting(
        0.1,
        help="The build fails if more than this share of the rows cannot be used.",
        minimum=0.0,
        maximum=1.0,
    )

    token_logps: bool = setting(
        False, help="Also keep the log-probability of each scored token; pairs without them are scored again."
    )
    drop_nonfinite: bool = setting(
        False,
        help="Leave pairs out of the mixture that the reference gives no finite log-probability, or one of exactly 0.",
    )

    dtype: str | None = setting(
        None,
        help="Precision of weights and forward passes [default: bfloat16 on a GPU, float32 on a CPU].",
        choices=("float32", "bfloat16", "float16"),
    )
    attn_implementation: str | None = setting(
        None,
        help="Attention kernel [default: sdpa, or eager where the architecture has no other].",
        choices=("sdpa", "eager", "flex_attention", "flash_attention_2"),
    )
    quantization: str | None = setting(
        None, help="Score with the model's weights quantized, for `dpo-train --use-qlora`.", choices=("nf4",)
    )
    trust_remote_code: bool = setting(False, help="Run Python code that comes with the model or the tokenizer.")

    num_workers: int | None = setting(None, help="Scoring processes [default: one a GPU, one on a CPU].", minimum=1)
    tokens_per_batch: int | None = setting(
        None,
        help="Token budget of one forward pass; a longer pair is scored alone. It halves when memory runs out "
        "[default: by a GPU's free memory, 8192 on a CPU].",
        minimum=1,
    )
    zero_stage: int = setting(
        0, help="3: partition the reference over all scoring processes (DeepSpeed ZeRO-3).", minimum=0, maximum=3
    )
    dry_run: bool = setting(False, help="Say what would be scored and what reused; load and write nothing.")
    verbose: bool = setting(False, help="List the row number of every row that cannot be used.")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.dataset:
            raise DpoCacheError("no --dataset is given", expected="one or more")
        if self.zero_stage not in (0, 3):
            raise DpoCacheError(f"--zero-stage is {self.zero_stage}", expected="3, or 0 for whole models")
        if self.adapter_revision and not self.adapter:
            raise DpoCacheError("--adapter-revision is given without --adapter", expected="both, or neither")
        if self.quantization and self.zero_stage:
            raise DpoCacheError(
                f"--quantization {self.quantization} is given with --zero-stage {self.zero_stage}, which cannot "
                "partition quantized weights",
                next_step="leave --zero-stage out: quantized, the model takes about a quarter of the memory",
            )
        if self.quantization and self.adapter:
            raise DpoCacheError(
                f"--quantization {self.quantization} is given with --adapter: no policy could start there",
                expected="a whole model",
                next_step="merge the adapter into its base (peft's merge_and_unload) and name the result as --model",
            )
        if self.replace and self.extend:
            raise DpoCacheError("--replace and --extend are given together", expected="one of them")
