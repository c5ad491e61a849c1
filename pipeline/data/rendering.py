"""Preferences to text: messages through the chat template, plain text as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ...errors import DpoCacheError
from .chat_template import ChatTemplate
from .preference import Message, Preference
from .tokenization_settings import TokenizationSettings
from .unusable_row import UnusableRow

_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, KeyError)
"""Templates refuse by raise_exception (a role, an order of turns) and by failing on a missing key."""
_PROBE: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What an assistant said in a conversation: the rendering up to its header, and the rendering through its end."""

    until_answer: str
    through_answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """The texts of one preference, before tokenizing.

    Attributes:
        prompt: Up to the header of the responses.
        chosen, rejected: The whole of each side.
        prompt_turns: The turns of the prompt that are scored.
        chosen_turns, rejected_turns: The turns of each response.
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_turns: Sequence[Turn]
    chosen_turns: Sequence[Turn]
    rejected_turns: Sequence[Turn]

    def texts(self) -> list[str]:
        """All that is to be tokenized: prompt, chosen and rejected first."""
        turns = (*self.prompt_turns, *self.chosen_turns, *self.rejected_turns)
        return [
            self.prompt,
            self.chosen,
            self.rejected,
            *(text for turn in turns for text in (turn.until_answer, turn.through_answer)),
        ]


class Renderer:
    """Renders preferences.

    Args:
        tokenizer: A tokenizer of ``transformers``, which knows how to run a template.
        chat_template: The template; None where there is none, which is fine for plain text.
        tool_template: The one for rows with tools; None where that is the same.
        settings: Which turns are to be found.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: ChatTemplate | None,
        tool_template: ChatTemplate | None,
        settings: TokenizationSettings,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._tool_template = tool_template
        self._settings = settings

    def render(self, preference: Preference) -> Rendering | UnusableRow:
        """The texts of one preference, or why there are none.

        Raises:
            DpoCacheError: It holds messages, and there is no chat template.
        """
        try:
            rendering = (
                _joined_text(preference, preference.prompt)
                if isinstance(preference.prompt, str)
                else self._render_messages(preference, preference.prompt)
            )
            for text in rendering.texts():
                text.encode()
        except UnusableRow as unusable:
            return unusable
        except UnicodeEncodeError:  # JSON can spell what no tokenizer takes
            return UnusableRow("lone-surrogate")
        except RecursionError:
            return UnusableRow("template-refused", "its values nest too deeply")
        except _TEMPLATE_FAULTS as error:
            return UnusableRow("template-refused", str(error))
        return rendering

    def _render_messages(self, preference: Preference, prompt: list[Message]) -> Rendering:
        assert isinstance(preference.chosen, list)
        assert isinstance(preference.rejected, list)
        messages = max(len(preference.chosen), len(preference.rejected))
        if messages > 1 and not self._settings.takes_several_messages:
            raise UnusableRow("several-messages", f"{len(preference.chosen)} against {len(preference.rejected)}")
        prompt_text = self._until_answer(preference, prompt)
        chosen = prompt + preference.chosen
        rejected = prompt + preference.rejected
        chosen_text = self._apply_template(preference, chosen)
        rejected_text = self._apply_template(preference, rejected)
        for full_text in (chosen_text, rejected_text):
            if not self._goes_on_from(preference, prompt, prompt_text, full_text):
                raise UnusableRow("template-rewrites-prompt")
        self._refuse_unsaid(preference, chosen, chosen_text, side="chosen")
        self._refuse_unsaid(preference, rejected, rejected_text, side="rejected")
        numbers = range(len(prompt) if self._settings.scores_all_turns else 0)
        return Rendering(
            prompt=prompt_text,
            chosen=chosen_text,
            rejected=rejected_text,
            prompt_turns=self._turns(preference, prompt, numbers, chosen_text),
            chosen_turns=self._response_turns(preference, chosen, prompt_text, chosen_text),
            rejected_turns=self._response_turns(preference, rejected, prompt_text, rejected_text),
        )

    def _refuse_unsaid(self, preference: Preference, conversation: list[Message], full_text: str, *, side: str) -> None:
        """Refuse a response that is empty because the template leaves out all that it has instead of text.

        Many templates know nothing of tool calls: what is scored of the turn would be its end alone.
        """
        first_response = len(preference.prompt)
        for number in range(0 if self._settings.scores_all_turns else first_response, len(conversation)):
            message = conversation[number]
            bare = {name: value for name, value in message.items() if name in ("role", "content")}
            instead = sorted(message.keys() - bare.keys())
            if message["role"] != "assistant" or not instead or (message.get("content") or "").strip():
                continue
            try:
                text = self._apply_template(preference, [*conversation[:number], bare, *conversation[number + 1 :]])
            except _TEMPLATE_FAULTS:
                continue  # it refuses an empty message, and this was none
            if text == full_text:
                where = side if number >= first_response else f"message {number + 1}"
                raise UnusableRow("empty-response", f"{where}: the template leaves out {', '.join(instead)}")

    def _response_turns(
        self, preference: Preference, conversation: list[Message], prompt_text: str, full_text: str
    ) -> list[Turn]:
        first = len(preference.prompt)
        if len(conversation) == first + 1:  # as nearly always, and both texts are there
            return [Turn(until_answer=prompt_text, through_answer=full_text)]
        return self._turns(preference, conversation, range(first, len(conversation)), full_text)

    def _turns(self, preference: Preference, conversation: list[Message], numbers: range, full_text: str) -> list[Turn]:
        """Those of the messages with these numbers that are the assistant's, as the whole rendering has them."""
        turns = []
        for number in numbers:
            if conversation[number]["role"] != "assistant":
                continue
            before = conversation[:number]
            turn = Turn(
                until_answer=self._until_answer(preference, before) if before else "",
                through_answer=self._apply_template(preference, conversation[: number + 1]),
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
        has_own = preference.tools is not None and self._tool_template is not None
        template = self._tool_template if has_own else self._chat_template
        if template is None:
            raise DpoCacheError(
                f"the tokenizer {self._settings.tokenizer} has no chat template, and the dataset holds messages",
                next_step="name one: --chat-template FILE_OR_NAME",
            )
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=preference.tools,
            chat_template=template.text,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            return_dict=False,
            **(preference.chat_template_kwargs or {}),
        )
        return text

    def rendered_probe(self) -> str | None:
        """A question and an answer through the template; None where it refuses them or there is none."""
        if self._chat_template is None:
            return None
        probe = Preference(prompt=_PROBE[:1], chosen=_PROBE[1:], rejected=_PROBE[1:])
        rendering = self.render(probe)
        return None if isinstance(rendering, UnusableRow) else rendering.chosen


def _joined_text(preference: Preference, prompt: str) -> Rendering:
    chosen, rejected = f"{prompt}{preference.chosen}", f"{prompt}{preference.rejected}"
    return Rendering(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        prompt_turns=(),
        chosen_turns=[Turn(until_answer=prompt, through_answer=chosen)],
        rejected_turns=[Turn(until_answer=prompt, through_answer=rejected)],
    )
