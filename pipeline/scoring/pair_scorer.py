"""The one scoring function of both stages: a batch in, log-probabilities of both sides of its pairs out.

Stage one calls it without gradients; in stage two it is the module that DeepSpeed wraps. Backbone and head are
called as modules inside its forward, so ZeRO-3 gathers their weights where DeepSpeed expects it.

Shapes: R rows, T tokens a row, N scored tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ...errors import DpoCacheError
from .attention_kernels import prepare_kernels
from .attention_masks import LayerWindows, attention_mask
from .completion_head import CompletionHead, install_completion_head
from .model_loading import find_backbone, find_causal_lm, find_head
from .onednn_linear import install_onednn_linear
from .position_table import position_limit
from .rope_limit import rope_limit
from .scoring_batch import Layout, PairLogps, ScoringBatch, reduce_token_logps

SCORING_VERSION = 1
"""Part of a reference's identity: raised whenever a change here moves a logp by more than rounding."""


class PairScorer(nn.Module):
    """Log-probabilities of pairs under a causal language model.

    Args:
        model: A causal language model of transformers, or a peft model around one. Its vocabulary head is given the
            ability to score targets; its parameter names stay as they are.
        head_chunk_tokens: Scored tokens whose logits are held at once; None to follow the vocabulary's size.
        load_balancing: Also return the load-balancing loss of a mixture-of-experts model.

    Raises:
        DpoCacheError: The model's vocabulary head is no plain linear layer.
    """

    def __init__(self, model: nn.Module, *, head_chunk_tokens: int | None = None, load_balancing: bool = False) -> None:
        super().__init__()
        self.model = model
        causal_lm = find_causal_lm(model)
        self.config: Any = causal_lm.config
        install_completion_head(find_head(causal_lm), self.config, chunk_tokens=head_chunk_tokens)
        install_onednn_linear(causal_lm)
        prepare_kernels(self.attention)
        self.load_balancing = load_balancing
        self.windows = LayerWindows.of_config(self.config)
        self.rope_limit = rope_limit(self.config)
        self.position_limit = position_limit(find_backbone(causal_lm), self.config)
        self.takes_positions = "position_ids" in inspect.signature(find_backbone(causal_lm).forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that logits are made with."""
        return find_head(self.model).weight.dtype

    @property
    def attention(self) -> str:
        """The attention kernel that the model was loaded with."""
        return str(self.config._attn_implementation)

    def forward(self, batch: ScoringBatch, *, through_full_logits: bool = False) -> PairLogps:
        """Score a batch.

        Args:
            batch: The pairs, on the model's device.
            through_full_logits: Take the slow way through ``model(...).logits``: the plain truth that the quick way
                is tested against when a model is first used.

        Raises:
            DpoCacheError: A sequence is so long that the model's rotary embedding would change for its neighbours, or
                that the model has no embeddings for its last positions.
        """
        if self.rope_limit is not None and batch.longest_sequence > self.rope_limit:
            raise DpoCacheError(
                f"a sequence of {batch.longest_sequence} tokens changes this model's rotary embedding for its batch",
                expected=f"at most {self.rope_limit} tokens, so that a value depends on its own sequence alone",
                next_step=f"--max-seq-length {self.rope_limit}",
            )
        if self.position_limit is not None and batch.longest_sequence > self.position_limit:
            raise DpoCacheError(
                f"a sequence of {batch.longest_sequence} tokens is longer than this model's table of positions",
                expected=f"at most {self.position_limit} tokens",
                next_step=f"--max-seq-length {self.position_limit}",
            )
        inputs = self._model_inputs(batch)
        causal_lm = find_causal_lm(self.model)
        if through_full_logits:
            logits_RTV = causal_lm(**inputs).logits
            logits_NV = logits_RTV.flatten(0, 1)[batch.scored_positions_N]
            logps_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(dim=-1)
            return reduce_token_logps(logps_NV.gather(1, batch.target_ids_N[:, None])[:, 0], batch)

        if self.load_balancing:
            inputs["output_router_logits"] = True
        output = find_backbone(causal_lm)(**inputs)
        head = find_head(causal_lm)
        assert isinstance(head, CompletionHead)
        hidden_NH = output.last_hidden_state.flatten(0, 1).index_select(0, batch.scored_positions_N)
        token_logps_N = head(hidden_NH, batch.target_ids_N)
        aux_loss = self._load_balancing_loss(output.router_logits, batch) if self.load_balancing else None
        return reduce_token_logps(token_logps_N, batch, aux_loss=aux_loss)

    def _model_inputs(self, batch: ScoringBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids_RT,
            "attention_mask": attention_mask(batch, windows=self.windows, kernel=self.attention, dtype=self.dtype),
            "use_cache": False,
        }
        if self.takes_positions:
            # Rows are rounded up: only padding can lie beyond the table.
            last = None if self.position_limit is None else self.position_limit - 1
            inputs["position_ids"] = batch.position_ids_RT if last is None else batch.position_ids_RT.clamp(max=last)
        else:
            assert batch.layout is Layout.PADDED, "a tree needs a model that takes position_ids"
        return inputs

    def _load_balancing_loss(self, router_logits: tuple[Tensor, ...], batch: ScoringBatch) -> Tensor:
        """Equations 4 to 6 of the Switch Transformer (arXiv 2101.03961), over real tokens only."""
        real_RT = batch.segment_RT >= 0
        num_experts = router_logits[0].shape[-1]
        loss: Tensor = load_balancing_loss_func(router_logits, num_experts, self.config.num_experts_per_tok, real_RT)
        return loss
