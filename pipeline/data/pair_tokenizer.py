"""Preferences to token ids: one rendering a side, the boundary found among tokens, masks from lengths.

The prompt of a pair is the longest common token prefix of the prompt rendered alone (with the generation prompt, so
that the answer's header belongs to the prompt) and of both whole renderings. Everything after it is the answer, up to
and including whatever the template writes behind the last message. Where an answer has several messages, what tools or
users say in it is not scored. Tokens are never found by comparing ids with pad.

Where the generation prompt opens a thought and only one of the answers goes on from there, the pair's prompt ends
before it. The tokens of the opening then belong to that answer and are not scored, so that each side scores the tokens
that it would beside an answer of its own kind.

The masks of open-instruct go by counts of tokens: an answer is scored from as many tokens on as its prompt has when
rendered alone. A token in which header and answer merge, and the first tokens of an answer that does not begin as the
generation prompt does, are then counted to the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from .chat_template import ChatTemplate, resolve_chat_template, resolve_tool_template
from .preference import Preference
from .rendering import Renderer, Rendering, Turn
from .special_tokens import SpecialTokens
from .token_pair import ScoredMask, TokenIds, TokenPair, canonical_scored_mask
from .tokenization_settings import TokenizationSettings
from .tokenizer import load_tokenizer, tokenizer_sha256, vocabulary_sha256
from .unusable_row import UnusableRow


class PairTokenizer:
    """Turns preferences into token pairs.

    Built from picklable settings alone, so that every process can have its own.

    Attributes:
        settings: What it was built from.
        tokenizer: The tokenizer of ``transformers``.
        chat_template: The template messages are rendered with; None where there is none.
        tool_template: The one for rows with tools; None where that is the same.
        truncated: Rows of which something was cut to make a pair that fits: of how many the ``prompt``, of how many
            the ``chosen`` and the ``rejected`` response, and of how many ``either`` of these two.

    Raises:
        DpoCacheError: The tokenizer cannot be loaded, or the template writes two bos or two eos.
    """

    def __init__(self, settings: TokenizationSettings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(
            settings.tokenizer, settings.tokenizer_revision, trust_remote_code=settings.trust_remote_code
        )
        self.chat_template = resolve_chat_template(self.tokenizer, settings.chat_template)
        self.truncated: Counter[str] = Counter()
        self.tool_template = resolve_tool_template(self.tokenizer, settings.chat_template)
        self._renderer = Renderer(self.tokenizer, self.chat_template, self.tool_template, settings)
        self._specials = SpecialTokens(self.tokenizer, settings.tokenizer)
        self._refuse_doubling_template()

    def tokenize(self, preference: Preference) -> TokenPair:
        """Turn one preference into tokens.

        Raises:
            UnusableRow: It makes no pair to train on; by reason.
            DpoCacheError: The tokenizer has no chat template, or no eos, and needs one.
        """
        (result,) = self.tokenize_batch([preference])
        if isinstance(result, UnusableRow):
            raise result
        return result

    def tokenize_batch(self, preferences: Sequence[Preference]) -> list[TokenPair | UnusableRow]:
        """Turn many preferences into tokens, each text of the batch tokenized once.

        Returns:
            For each preference its pair, or the reason why there is none.

        Raises:
            DpoCacheError: As :meth:`tokenize`.
        """
        renderings = [self._renderer.render(preference) for preference in preferences]
        token_ids = self._encode(renderings)
        return [
            rendering
            if isinstance(rendering, UnusableRow)
            else self._pair(rendering, token_ids, is_chat=not isinstance(preference.prompt, str))
            for preference, rendering in zip(preferences, renderings, strict=True)
        ]

    def description(self) -> dict[str, Any]:
        """What a mixture records of how its tokens were made; nothing here is needed to read them."""
        return {
            "settings": asdict(self.settings),
            "chat_template": _described(self.chat_template),
            "tool_chat_template": _described(self.tool_template),
            "rendered_example": self._renderer.rendered_probe(),
            "tokenizer_class": type(self.tokenizer).__name__,
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "vocabulary_sha256": vocabulary_sha256(self.tokenizer),
            "special_tokens": {
                name: {"token": token, "id": self.tokenizer.convert_tokens_to_ids(token)}
                for name, token in sorted(self.tokenizer.special_tokens_map.items())
                if isinstance(token, str)
            },
            "libraries": {name: version(name) for name in ("jinja2", "tokenizers", "transformers")},
        }

    def _refuse_doubling_template(self) -> None:
        text = self._renderer.rendered_probe()
        if text is None:
            return
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        for name, doubled in (("bos", self._specials.begins_twice(ids)), ("eos", self._specials.ends_twice(ids))):
            if doubled:
                raise DpoCacheError(
                    f"the chat template writes two {name} tokens: {text!r}",
                    next_step="remove one from the template, or choose another with --chat-template",
                )

    # ---- text to tokens ----

    def _encode(self, renderings: Sequence[Rendering | UnusableRow]) -> dict[str, TokenIds]:
        """Tokenize every distinct text once; templates write their own special tokens, so none are added."""
        distinct = list(
            dict.fromkeys(
                text for rendering in renderings if not isinstance(rendering, UnusableRow) for text in rendering.texts()
            )
        )
        if not distinct:
            return {}
        encoded = self.tokenizer(
            distinct,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return {text: np.asarray(ids, dtype=np.int32) for text, ids in zip(distinct, encoded["input_ids"], strict=True)}

    def _pair(self, rendering: Rendering, token_ids: dict[str, TokenIds], *, is_chat: bool) -> TokenPair | UnusableRow:
        try:
            return self._fitted(self._whole_pair(rendering, token_ids, is_chat=is_chat))
        except UnusableRow as unusable:
            return unusable

    def _whole_pair(self, rendering: Rendering, token_ids: dict[str, TokenIds], *, is_chat: bool) -> TokenPair:
        """The pair before truncation."""
        prompt, chosen, rejected = (token_ids[text] for text in rendering.texts()[:3])
        boundaries = [_common_prefix_length(prompt, answer) for answer in (chosen, rejected)]
        boundary = min(boundaries)
        by_count = self.settings.counts_tokens and is_chat
        if boundary != max(boundaries) and not by_count and not _opens_one_only(rendering):
            raise UnusableRow("boundary-differs")
        prompt_scored = _scored(rendering.prompt_turns, token_ids, chosen, by_count=by_count)[:boundary]
        chosen_scored = _scored(rendering.chosen_turns, token_ids, chosen, by_count=by_count)[boundary:]
        rejected_scored = _scored(rendering.rejected_turns, token_ids, rejected, by_count=by_count)[boundary:]
        prompt, chosen, rejected = prompt[:boundary], chosen[boundary:], rejected[boundary:]
        if not is_chat:
            prompt, chosen, rejected = self._specials.around_text(prompt, chosen, rejected)
        self._refuse_unusable(prompt, chosen, rejected)
        return _token_pair((prompt, chosen, rejected), (prompt_scored, chosen_scored, rejected_scored))

    def _refuse_unusable(self, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds) -> None:
        if len(prompt) == 0:
            raise UnusableRow("no-prompt")
        if len(chosen) == 0 or len(rejected) == 0:
            raise UnusableRow("empty-response")
        if np.array_equal(chosen, rejected):
            raise UnusableRow("identical-responses", "the template or the tokenizer leaves out what differs")
        # The template was found sound on a probe: what is doubled here is written in the row's own text.
        if self._specials.begins_twice(np.concatenate([prompt[:2], chosen[:1]])):
            raise UnusableRow("double-bos")
        if self._specials.ends_twice(chosen) or self._specials.ends_twice(rejected):
            raise UnusableRow("double-eos")

    # ---- truncation ----

    def _fitted(self, pair: TokenPair) -> TokenPair:
        limit = self.settings.max_seq_length
        longer_answer = max(len(pair.chosen_ids), len(pair.rejected_ids))
        if limit is None or len(pair.prompt_ids) + longer_answer <= limit:
            return pair
        match self.settings.truncation:
            case "drop":
                raise UnusableRow("too-long", f"{len(pair.prompt_ids) + longer_answer} tokens")
            case "truncate-prompt-left":
                fitted = self._with_prompt_of(pair, limit - longer_answer)
                self.truncated["prompt"] += 1
            case "truncate-response-right":
                fitted = _with_answers_of(pair, limit - len(pair.prompt_ids))
                self.truncated["chosen"] += len(fitted.chosen_ids) < len(pair.chosen_ids)
                self.truncated["rejected"] += len(fitted.rejected_ids) < len(pair.rejected_ids)
                self.truncated["either"] += 1
        return fitted

    def _with_prompt_of(self, pair: TokenPair, num_tokens: int) -> TokenPair:
        """Cut the prompt at its left; a leading bos stays, since models are lost without it."""
        if num_tokens < 1:
            raise UnusableRow("response-too-long")
        has_bos = pair.prompt_ids[0] == self._specials.bos
        tail = np.arange(len(pair.prompt_ids) - num_tokens, len(pair.prompt_ids))
        kept = np.concatenate([[0], tail[1:]]) if has_bos else tail
        return _token_pair(
            (pair.prompt_ids[kept], pair.chosen_ids, pair.rejected_ids),
            (pair.prompt_scored[kept], pair.chosen_scored, pair.rejected_scored),
        )


def _scored(turns: Sequence[Turn], token_ids: dict[str, TokenIds], full_ids: TokenIds, *, by_count: bool) -> ScoredMask:
    """Which tokens of a whole rendering belong to these turns."""
    scored = np.zeros(len(full_ids), dtype=np.bool_)
    for turn in turns:
        start, end = (token_ids[text] for text in (turn.until_answer, turn.through_answer))
        if by_count:
            scored[len(start) : len(end)] = True
        else:
            scored[_common_prefix_length(start, full_ids) : _common_prefix_length(end, full_ids)] = True
    return scored


def _opens_one_only(rendering: Rendering) -> bool:
    """Whether one answer goes on from the generation prompt, and the other from what stands before it.

    Thinking templates open a ``<think>`` in the generation prompt. An answer without a thought has none.
    """
    return rendering.chosen.startswith(rendering.prompt) != rendering.rejected.startswith(rendering.prompt)


def _described(template: ChatTemplate | None) -> dict[str, str] | None:
    return None if template is None else {"name": template.name, "sha256": template.sha256, "text": template.text}


def _with_answers_of(pair: TokenPair, num_tokens: int) -> TokenPair:
    """Cut each answer at its right."""
    if num_tokens < 1:
        raise UnusableRow("prompt-too-long")
    chosen, rejected = pair.chosen_ids[:num_tokens], pair.rejected_ids[:num_tokens]
    if np.array_equal(chosen, rejected):
        raise UnusableRow("identical-after-truncation")
    return _token_pair(
        (pair.prompt_ids, chosen, rejected),
        (pair.prompt_scored, pair.chosen_scored[:num_tokens], pair.rejected_scored[:num_tokens]),
    )


def _token_pair(ids: tuple[TokenIds, TokenIds, TokenIds], scored: Sequence[ScoredMask]) -> TokenPair:
    """A pair of prompt, chosen and rejected; its mask is None where it says no more than the default does."""
    prompt, chosen, rejected = ids
    prompt_scored, chosen_scored, rejected_scored = scored
    # Plain text has got a bos in front and an eos behind each answer since its masks were made.
    prompt_scored = np.concatenate([np.zeros(len(prompt) - len(prompt_scored), np.bool_), prompt_scored])
    chosen_scored = np.concatenate([chosen_scored, np.ones(len(chosen) - len(chosen_scored), np.bool_)])
    rejected_scored = np.concatenate([rejected_scored, np.ones(len(rejected) - len(rejected_scored), np.bool_)])
    prompt_scored[0] = False  # nothing predicts the very first token
    scored_mask = np.concatenate([prompt_scored, chosen_scored, rejected_scored])
    pair = TokenPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, scored_mask=scored_mask)
    pair = replace(pair, scored_mask=canonical_scored_mask(pair))
    if not pair.chosen_tokens or not pair.rejected_tokens:
        raise UnusableRow("nothing-scored")
    return pair


def _common_prefix_length(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
