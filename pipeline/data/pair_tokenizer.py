"""Preferences to token ids: one rendering a side, the boundary found among tokens, masks from lengths.

The prompt of a pair is the longest common token prefix of the prompt rendered alone (with the generation prompt, so
that the answer's header belongs to the prompt) and of both whole renderings. Everything after it is the answer, up to
and including whatever the template writes behind the last message. Tokens are never found by comparing ids with pad.

The masks of open-instruct go by counts of tokens: an answer is scored from as many tokens on as its prompt has when
rendered alone. A token in which header and answer merge, and the first tokens of an answer that does not begin as the
generation prompt does, are then counted to the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import AutoTokenizer

from ...errors import DpoCacheError
from .chat_template import ChatTemplate, resolve_chat_template
from .preference import Message, Preference
from .token_pair import ScoredMask, TokenIds, TokenPair
from .unusable_row import UnusableRow

Truncation = Literal["drop", "truncate-prompt-left", "truncate-response-right"]
MaskChoice = Literal["last-turn", "all-turns", "open-instruct-last-turn", "open-instruct-all-turns"]

_PROBE: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizationSettings:
    """All that decides which tokens a preference becomes.

    Attributes:
        tokenizer: Folder or Hub id of the tokenizer.
        tokenizer_revision: Its revision, for a Hub id.
        chat_template: A pinned name, a file, or None for the tokenizer's own.
        max_seq_length: Most tokens of prompt and longer answer together; None for no limit.
        truncation: What becomes of longer pairs: dropped, or the prompt cut at its left (a leading bos stays), or
            each answer cut at its right (its eos is lost then).
        mask: Score the last answer only, or every assistant's turn; either also token by token as open-instruct did.
    """

    tokenizer: str
    tokenizer_revision: str | None = None
    chat_template: str | None = None
    max_seq_length: int | None = None
    truncation: Truncation = "drop"
    mask: MaskChoice = "last-turn"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--truncation", self.truncation, get_args(Truncation)),
            ("--mask", self.mask, get_args(MaskChoice)),
        ):
            if value not in choices:
                raise DpoCacheError(f"{option} {value} is unknown", expected=" or ".join(choices))
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise DpoCacheError(
                f"--max-seq-length {self.max_seq_length} holds no prompt and answer", expected="at least 2"
            )
        if self.max_seq_length is None and self.truncation != "drop":
            raise DpoCacheError(
                f"--truncation {self.truncation} without a length does nothing", next_step="add --max-seq-length N"
            )

    @property
    def scores_all_turns(self) -> bool:
        """Whether earlier answers are scored too."""
        return self.mask.endswith("all-turns")

    @property
    def counts_tokens(self) -> bool:
        """Whether answers are found by counts of tokens, as open-instruct finds them."""
        return self.mask.startswith("open-instruct")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """An earlier answer inside the prompt: the rendering up to its header, and the rendering through its end."""

    until_answer: str
    through_answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rendering:
    """The texts of one preference, before tokenizing."""

    prompt: str
    chosen: str
    rejected: str
    earlier_turns: Sequence[_Turn] = ()

    def texts(self) -> list[str]:
        turns = [text for turn in self.earlier_turns for text in (turn.until_answer, turn.through_answer)]
        return [self.prompt, self.chosen, self.rejected, *turns]


class PairTokenizer:
    """Turns preferences into token pairs.

    Built from picklable settings alone, so that every process can have its own.

    Attributes:
        settings: What it was built from.
        tokenizer: The tokenizer of ``transformers``.
        chat_template: The template messages are rendered with; None where there is none.
        truncated: Rows whose ``chosen`` and whose ``rejected`` side was longer than ``max_seq_length``, whatever
            ``truncation`` then did about it.

    Raises:
        DpoCacheError: The tokenizer cannot be loaded, or the template writes two bos or two eos.
    """

    def __init__(self, settings: TokenizationSettings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_revision)
        self.chat_template: ChatTemplate | None = resolve_chat_template(self.tokenizer, settings.chat_template)
        self.truncated: Counter[str] = Counter()
        self._text_prefix = self._tokens_before_plain_text()
        self._refuse_doubled_specials()

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
        renderings = [self._render(preference) for preference in preferences]
        token_ids = self._encode(renderings)
        return [
            rendering
            if isinstance(rendering, UnusableRow)
            else self._pair(rendering, token_ids, is_chat=not isinstance(preference.prompt, str))
            for preference, rendering in zip(preferences, renderings, strict=True)
        ]

    def description(self) -> dict[str, Any]:
        """What a mixture records of how its tokens were made; nothing here is needed to read them."""
        template = self.chat_template
        return {
            "settings": asdict(self.settings),
            "chat_template": None
            if template is None
            else {"name": template.name, "sha256": template.sha256, "text": template.text},
            "rendered_example": self._rendered_probe(),
            "tokenizer_class": type(self.tokenizer).__name__,
            "tokenizer_sha256": _tokenizer_sha256(self.tokenizer),
            "vocabulary_sha256": vocabulary_sha256(self.tokenizer),
            "special_tokens": {
                name: {"token": token, "id": self.tokenizer.convert_tokens_to_ids(token)}
                for name, token in sorted(self.tokenizer.special_tokens_map.items())
                if isinstance(token, str)
            },
            "libraries": {name: version(name) for name in ("jinja2", "tokenizers", "transformers")},
        }

    # ---- preferences to text ----

    def _render(self, preference: Preference) -> _Rendering | UnusableRow:
        if isinstance(preference.prompt, str):
            return _Rendering(
                prompt=preference.prompt,
                chosen=f"{preference.prompt}{preference.chosen}",
                rejected=f"{preference.prompt}{preference.rejected}",
            )
        try:
            return self._render_messages(preference, preference.prompt)
        except UnusableRow as unusable:
            return unusable
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            # Templates refuse by raise_exception (a role, an order of turns) and by failing on a missing key.
            return UnusableRow("template-refused", str(error))

    def _render_messages(self, preference: Preference, prompt: list[Message]) -> _Rendering:
        assert isinstance(preference.chosen, list)
        assert isinstance(preference.rejected, list)
        prompt_text = self._until_answer(preference, prompt)
        chosen_text = self._apply_template(preference, prompt + preference.chosen)
        rejected_text = self._apply_template(preference, prompt + preference.rejected)
        for answer_text in (chosen_text, rejected_text):
            if not self._goes_on_from(preference, prompt, prompt_text, answer_text):
                raise UnusableRow("template-rewrites-prompt")
        return _Rendering(
            prompt=prompt_text,
            chosen=chosen_text,
            rejected=rejected_text,
            earlier_turns=self._earlier_turns(preference, prompt, chosen_text),
        )

    def _earlier_turns(self, preference: Preference, prompt: list[Message], full_text: str) -> list[_Turn]:
        if not self.settings.scores_all_turns:
            return []
        turns = []
        for number, message in enumerate(prompt):
            if message["role"] != "assistant":
                continue
            before = prompt[:number]
            turn = _Turn(
                until_answer=self._until_answer(preference, before) if before else "",
                through_answer=self._apply_template(preference, prompt[: number + 1]),
            )
            if not full_text.startswith(turn.through_answer) or not (
                self._goes_on_from(preference, before, turn.until_answer, full_text)
            ):
                raise UnusableRow("template-rewrites-history", f"message {number + 1}")
            turns.append(turn)
        return turns

    def _goes_on_from(self, preference: Preference, messages: list[Message], until_answer: str, full_text: str) -> bool:
        """Whether a rendering begins as that of its first messages alone.

        The generation prompt may differ from what the template writes in front of a finished answer (thinking
        templates open a <think> there), the messages before it may not.
        """
        return full_text.startswith(until_answer) or full_text.startswith(self._apply_template(preference, messages))

    def _until_answer(self, preference: Preference, messages: list[Message]) -> str:
        return self._apply_template(preference, messages, add_generation_prompt=True)

    def _apply_template(
        self, preference: Preference, messages: list[Message], *, add_generation_prompt: bool = False
    ) -> str:
        if self.chat_template is None:
            raise DpoCacheError(
                f"the tokenizer {self.settings.tokenizer} has no chat template, and the dataset holds messages",
                next_step="name one: --chat-template FILE_OR_NAME",
            )
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tools=preference.tools,
            chat_template=self.chat_template.text,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            return_dict=False,
            **(preference.chat_template_kwargs or {}),
        )
        return text

    # ---- text to tokens ----

    def _encode(self, renderings: Sequence[_Rendering | UnusableRow]) -> dict[str, TokenIds]:
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

    def _pair(self, rendering: _Rendering, token_ids: dict[str, TokenIds], *, is_chat: bool) -> TokenPair | UnusableRow:
        try:
            return self._fitted(self._whole_pair(rendering, token_ids, is_chat=is_chat))
        except UnusableRow as unusable:
            return unusable

    def _whole_pair(self, rendering: _Rendering, token_ids: dict[str, TokenIds], *, is_chat: bool) -> TokenPair:
        """The pair before truncation."""
        prompt, chosen, rejected = (token_ids[text] for text in rendering.texts()[:3])
        boundaries = [_common_prefix_length(prompt, answer) for answer in (chosen, rejected)]
        boundary = min(boundaries)
        by_count = self.settings.counts_tokens and is_chat
        if boundary != max(boundaries) and not by_count:
            raise UnusableRow("boundary-differs")
        first_scored = len(prompt) - boundary if by_count else 0
        prompt_scored = self._scored_turns(rendering, token_ids, chosen)[:boundary]
        prompt, chosen, rejected = prompt[:boundary], chosen[boundary:], rejected[boundary:]
        if not is_chat:
            prompt, chosen, rejected = self._with_text_specials(prompt, chosen, rejected)

        if len(prompt) == 0:
            raise UnusableRow("no-prompt")
        if len(chosen) == 0 or len(rejected) == 0:
            raise UnusableRow("empty-answer")
        if np.array_equal(chosen, rejected):
            raise UnusableRow("identical-answers")
        self._refuse_doubled_specials_of_row(prompt, chosen, rejected)
        answers_scored = [np.arange(len(answer)) >= first_scored for answer in (chosen, rejected)]
        return _token_pair((prompt, chosen, rejected), (prompt_scored, *answers_scored))

    def _scored_turns(self, rendering: _Rendering, token_ids: dict[str, TokenIds], full_ids: TokenIds) -> ScoredMask:
        """Which tokens of a whole rendering belong to an earlier answer."""
        scored = np.zeros(len(full_ids), dtype=np.bool_)
        for turn in rendering.earlier_turns:
            start, end = (token_ids[text] for text in (turn.until_answer, turn.through_answer))
            if self.settings.counts_tokens:
                scored[len(start) : len(end)] = True
            else:
                scored[_common_prefix_length(start, full_ids) : _common_prefix_length(end, full_ids)] = True
        return scored

    # ---- special tokens ----

    def _tokens_before_plain_text(self) -> TokenIds:
        """What the tokenizer itself writes in front of plain text: its bos, mostly."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        marked = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        start = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
        return np.asarray(marked[:start], dtype=np.int32)

    def _with_text_specials(
        self, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds
    ) -> tuple[TokenIds, TokenIds, TokenIds]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DpoCacheError(
                f"the tokenizer {self.settings.tokenizer} has no eos, and plain text answers end with one",
                next_step="set eos_token in its tokenizer_config.json, or use a dataset of messages",
            )
        end = np.asarray([eos], dtype=np.int32)
        return (
            np.concatenate([self._text_prefix, prompt]),
            np.concatenate([chosen, end]),
            np.concatenate([rejected, end]),
        )

    def _rendered_probe(self) -> str | None:
        """A question and an answer through the template; None where it refuses them or there is none."""
        if self.chat_template is None:
            return None
        probe = Preference(prompt=_PROBE[:1], chosen=_PROBE[1:], rejected=_PROBE[1:])
        rendering = self._render(probe)
        return None if isinstance(rendering, UnusableRow) else rendering.chosen

    def _refuse_doubled_specials(self) -> None:
        text = self._rendered_probe()
        if text is None:
            return
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        for name, doubled in (("bos", self._begins_twice(ids)), ("eos", self._ends_twice(ids))):
            if doubled:
                raise DpoCacheError(
                    f"the chat template writes two {name} tokens: {text!r}",
                    next_step="remove one from the template, or choose another with --chat-template",
                )

    def _refuse_doubled_specials_of_row(self, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds) -> None:
        """The settings were found sound on a probe: what is doubled here is written in the row's own text."""
        if self._begins_twice(np.concatenate([prompt[:2], chosen[:1]])):
            raise UnusableRow("double-bos")
        if self._ends_twice(chosen) or self._ends_twice(rejected):
            raise UnusableRow("double-eos")

    def _begins_twice(self, ids: TokenIds) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and len(ids) > 1 and bool(ids[0] == bos and ids[1] == bos)

    def _ends_twice(self, ids: TokenIds) -> bool:
        """Whether the last two tokens are eos, leaving aside white space that a template writes behind it."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return False
        last = np.flatnonzero(ids == eos)[-2:]
        if len(last) < 2 or last[1] != last[0] + 1:
            return False
        behind = ids[last[1] + 1 :].tolist()
        return not behind or not self.tokenizer.decode(behind).strip()

    # ---- truncation ----

    def _fitted(self, pair: TokenPair) -> TokenPair:
        limit = self.settings.max_seq_length
        longer_answer = max(len(pair.chosen_ids), len(pair.rejected_ids))
        if limit is None or len(pair.prompt_ids) + longer_answer <= limit:
            return pair
        for side, answer in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            self.truncated[side] += len(pair.prompt_ids) + len(answer) > limit
        match self.settings.truncation:
            case "drop":
                raise UnusableRow("too-long", f"{len(pair.prompt_ids) + longer_answer} tokens")
            case "truncate-prompt-left":
                return self._with_prompt_of(pair, limit - longer_answer)
            case "truncate-response-right":
                return _with_answers_of(pair, limit - len(pair.prompt_ids))

    def _with_prompt_of(self, pair: TokenPair, num_tokens: int) -> TokenPair:
        """Cut the prompt at its left; a leading bos stays, since models are lost without it."""
        if num_tokens < 1:
            raise UnusableRow("answer-too-long")
        has_bos = pair.prompt_ids[0] == self.tokenizer.bos_token_id
        tail = np.arange(len(pair.prompt_ids) - num_tokens, len(pair.prompt_ids))
        kept = np.concatenate([[0], tail[1:]]) if has_bos else tail
        return _token_pair(
            (pair.prompt_ids[kept], pair.chosen_ids, pair.rejected_ids),
            (pair.prompt_scored[kept], pair.chosen_scored, pair.rejected_scored),
        )


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
    prompt_scored = np.concatenate([np.zeros(len(prompt) - len(prompt_scored), np.bool_), prompt_scored])
    prompt_scored[0] = False  # nothing predicts the very first token
    scored_mask = np.concatenate([prompt_scored, chosen_scored, rejected_scored])
    is_default = chosen_scored.all() and rejected_scored.all() and not prompt_scored.any()
    pair = TokenPair(
        prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, scored_mask=None if is_default else scored_mask
    )
    if not pair.chosen_tokens or not pair.rejected_tokens:
        raise UnusableRow("nothing-scored")
    return pair


def _common_prefix_length(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


# ---- the tokenizer ----


def load_tokenizer(name: str, revision: str | None) -> Any:
    """A tokenizer of ``transformers``, from a folder or the Hub; code that comes with it is not run.

    Raises:
        DpoCacheError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more, with long texts
        raise DpoCacheError(
            f"the tokenizer {name} cannot be loaded: {str(error).strip().splitlines()[0]}",
            expected="a folder with tokenizer.json, or a Hub id",
            next_step="name another with --tokenizer",
        ) from error


def vocabulary_sha256(tokenizer: Any) -> str:
    """Digest of which id means which token, in hex: equal for tokenizers whose ids can be read for each other's."""
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])):
        token_bytes = token.encode()
        digest.update(token_id.to_bytes(8, "little") + len(token_bytes).to_bytes(8, "little") + token_bytes)
    return digest.hexdigest()


def _tokenizer_sha256(tokenizer: Any) -> str | None:
    """Digest of the whole tokenizer (merges, normaliser, splitting); None for one that is not a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    for state_of_last_call in ("truncation", "padding"):
        content.pop(state_of_last_call, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
