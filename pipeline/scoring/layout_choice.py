"""Which layout a model is scored in: read off its config, then proved on a probe before it is relied upon.

Shape suffix: N scored tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ...errors import DpoCacheError
from ..data.token_pair import TokenPair
from .attention_masks import FULL, SLIDING, TREE_KERNELS
from .layouts import FLEX_BLOCK_TOKENS, padded_batch, scoring_batch
from .model_loading import find_causal_lm
from .pair_scorer import PairScorer
from .scoring_batch import Layout, PairLogps, token_logps_of_sides

log = logging.getLogger(__name__)

Scorer = Callable[..., PairLogps]

MEAN_TOLERANCE_NATS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Mean absolute difference a token that rounding explains. A wrong mask or head costs a real model 0.1 to 50 nats."""


def choose_layout(scorer: nn.Module, *, device: torch.device | str, pairs: Sequence[TokenPair] = ()) -> Layout:
    """The quickest layout that is right, proved against one-by-one scoring, the head against ``model(...).logits``.

    Under ZeRO-3 every rank has to call this alike, with the engine (its hooks gather the weights).

    Args:
        scorer: A :class:`PairScorer`, or the DeepSpeed engine around one.
        device: Where batches go.
        pairs: Real pairs to prove the layout on, besides a built-in probe of a few tokens.

    Raises:
        DpoCacheError: No layout reproduces the model's own values, or the model has no finite value for any token.
    """
    pair_scorer = scorer if isinstance(scorer, PairScorer) else scorer.module
    assert isinstance(pair_scorer, PairScorer)
    tolerance = MEAN_TOLERANCE_NATS[pair_scorer.dtype]
    self_test = _SelfTest(
        scorer=scorer,
        probe=_probe_pairs(pair_scorer.config.get_text_config().vocab_size),
        real=pairs,
        device=device,
        # flex_attention would be compiled anew for every other length.
        plain_row_multiple=FLEX_BLOCK_TOKENS if pair_scorer.attention == "flex_attention" else 1,
    )
    for layout in _candidates(pair_scorer):
        try:
            difference = self_test.mean_difference(layout)
        except torch.OutOfMemoryError:
            # Other ranks of an engine are in the middle of the same pass, and may have had the room.
            if layout is Layout.PADDED or scorer is not pair_scorer:
                raise
            log.warning("the %s layout does not fit: its mask is as wide as the longest row, squared", layout)
            continue
        if difference <= tolerance:
            return layout
        log.warning(
            "the %s layout and the model's own logits differ by %.2g nats a token (%.0e allowed)",
            layout,
            difference,
            tolerance,
        )
    raise DpoCacheError(
        f"{pair_scorer.config.model_type} models cannot be scored here: the {layout} layout does not reproduce the "
        f"model's own values, which are {difference:.2g} nats a token away",
        expected=f"at most {tolerance:.0e}",
        next_step="report the model: it may attend to something that a layout cannot express, or do something to its "
        "logits that this version does not know",
    )


def _candidates(scorer: PairScorer) -> list[Layout]:
    """The quickest first; the last is right for every causal architecture."""
    obstacle = tree_obstacle(scorer)
    if obstacle is not None:
        log.info("padded layout: %s", obstacle)
        return [Layout.PADDED]
    quickest = Layout.PACKED if scorer.attention == "flex_attention" else Layout.PREFIX_SHARED
    return [quickest, Layout.PADDED]


def tree_obstacle(scorer: PairScorer) -> str | None:
    """Why several responses behind one prompt would not be scored right, as far as the config tells; None if fine."""
    config = scorer.config.get_text_config()
    if scorer.attention not in TREE_KERNELS:
        return f"{scorer.attention} takes no mask of our own"
    if not scorer.takes_positions:
        return f"{config.model_type} models take no position_ids"
    if find_causal_lm(scorer.model)._is_stateful:
        return f"{config.model_type} models carry a state from one response into the next"
    if other := scorer.windows.layer_types - {FULL, SLIDING}:
        return f"{config.model_type} has layers of {', '.join(sorted(other))}"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return f"{config.model_type} measures its local attention in columns, not in positions"
    if getattr(config, "alibi", False):
        return "ALiBi measures distances in columns, not in positions"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _SelfTest:
    """Pairs, scored in a layout and one by one; the few tokens of the probe through the model's full logits too."""

    scorer: Scorer
    probe: Sequence[TokenPair]
    real: Sequence[TokenPair]
    device: torch.device | str
    plain_row_multiple: int

    @torch.no_grad()
    def mean_difference(self, layout: Layout) -> float:
        """Mean absolute difference a token, in nats; NaN if a value is NaN in the layout alone.

        A pair that the model itself has no finite value for says nothing about the layout.

        Raises:
            DpoCacheError: The model has no finite value for any of them.
        """
        batch = scoring_batch([*self.probe, *self.real], layout).to(self.device)
        ours = token_logps_of_sides(self.scorer(batch).token_logps_N, batch)
        plain = [
            # Whole logits of a long pair would take more memory than anything that comes later.
            self._alone(pair, side, through_full_logits=pair in self.probe)
            for side in ("chosen", "rejected")
            for pair in [*self.probe, *self.real]
        ]
        ours_N, plain_N = torch.cat(ours), torch.cat(plain)
        if plain_N.isnan().all():
            raise DpoCacheError(
                "the model gives no token a finite log-probability",
                expected="weights without NaN or infinity, in a dtype that holds what it computes",
                next_step="look at the checkpoint, or try another --dtype",
            )
        return float((ours_N - plain_N)[~plain_N.isnan()].abs().mean())

    def _alone(self, pair: TokenPair, side: str, *, through_full_logits: bool) -> torch.Tensor:
        """Token logps of one sequence that is alone in its batch."""
        response = pair.chosen_ids if side == "chosen" else pair.rejected_ids
        scored = pair.chosen_scored if side == "chosen" else pair.rejected_scored
        alone = replace(
            pair,
            chosen_ids=response,
            rejected_ids=response,
            scored_mask=np.concatenate([pair.prompt_scored, scored, scored]),
        )
        batch = padded_batch([alone], multiple=self.plain_row_multiple).to(self.device)
        logps = self.scorer(batch, through_full_logits=through_full_logits)
        return token_logps_of_sides(logps.token_logps_N, batch)[0]


def _probe_pairs(vocabulary: int) -> list[TokenPair]:
    """Two prompts, three pairs, five distinct responses: shared ones, one of a single token."""
    random = np.random.RandomState(0)

    def ids(tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return random.randint(0, vocabulary, tokens).astype(np.int32)

    prompt, shared = ids(6), ids(5)
    return [
        TokenPair(prompt_ids=prompt, chosen_ids=shared, rejected_ids=ids(3)),
        TokenPair(prompt_ids=ids(3), chosen_ids=ids(1), rejected_ids=ids(4)),
        TokenPair(prompt_ids=prompt, chosen_ids=ids(4), rejected_ids=shared),
    ]
