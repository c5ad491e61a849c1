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

_PROBE: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """An earlier answer inside the prompt: the rendering up to its header, and the rendering through its end."""

    until_answer: str
    through_answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """The texts of one preference, before tokenizing."""

    prompt: str
    chosen: str
    rejected: str
    earlier_turns: Sequence[Turn] = ()

    def texts(self) -> list[str]:
        """All that is to be tokenized: prompt, chosen and rejected first."""
        turns = [text for turn in self.earlier_turns for text in (turn.until_answer, turn.through_answer)]
        return [self.prompt, self.chosen, self.rejected, *turns]


class Renderer:
    """Renders preferences.

    Args:
        tokenizer: A tokenizer of ``transformers``, which knows how to run a template.
        chat_template: The template; None where there is none, which is fine for plain text.
        tool_template: The one for rows with tools; None where that is the same.
        settings: Whether earlier answers are to be found too.
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
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            # Templates refuse by raise_exception (a role, an order of turns) and by failing on a missing key.
            return UnusableRow("template-refused", str(error))
        return rendering

    def _render_messages(self, preference: Preference, prompt: list[Message]) -> Rendering:
        assert isinstance(preference.chosen, list)
        assert isinstance(preference.rejected, list)
        prompt_text = self._until_answer(preference, prompt)
        chosen_text = self._apply_template(preference, prompt + preference.chosen)
        rejected_text = self._apply_template(preference, prompt + preference.rejected)
        for answer_text in (chosen_text, rejected_text):
            if not self._goes_on_from(preference, prompt, prompt_text, answer_text):
                raise UnusableRow("template-rewrites-prompt")
        return Rendering(
            prompt=prompt_text,
            chosen=chosen_text,
            rejected=rejected_text,
            earlier_turns=self._earlier_turns(preference, prompt, chosen_text),
        )

    def _earlier_turns(self, preference: Preference, prompt: list[Message], full_text: str) -> list[Turn]:
        if not self._settings.scores_all_turns:
            return []
        turns = []
        for number, message in enumerate(prompt):
            if message["role"] != "assistant":
                continue
            before = prompt[:number]
            turn = Turn(
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
    return Rendering(prompt=prompt, chosen=f"{prompt}{preference.chosen}", rejected=f"{prompt}{preference.rejected}")
