"""Run a chat template on messages, with limits of time and memory.

A template comes with a model, so it may be wrong or hostile: transformers runs it in a sandbox, and
`foundation.limits` ends what takes too long.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_lite.data.row_errors import RowError
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.limits import LimitReached, limited

# Some templates write today's date. With a fixed date the tokens are the same every day, so that a
# run can resume.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

RENDER_SECONDS, RENDER_BYTES = 10.0, 2**30
"""For one conversation. A common one takes less than a millisecond and a megabyte."""

Span = tuple[int, int]


class JinjaTemplate:
    """The source of a chat template, and the special tokens that it can write by their names.

    Raises:
        DataError: if it computes powers.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        _require_no_powers(source)
        self.source = source
        self.marks_answers = re.search(r"{%-?\s*generation\s*-?%}", source) is not None
        self._special_tokens = dict(special_tokens)
        self._dated = FIXED_DATE + source if "strftime_now" in source else source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
        **switches: bool,
    ) -> tuple[str, list[Span]]:
        """The text of the messages, and the spans that the template marks with {% generation %}.

        Args:
            switches: variables of the template, such as `enable_thinking`.

        Raises:
            RowError: if the template raises an error.
            DataError: if it takes too long, or too much memory.
        """
        try:
            with limited(RENDER_SECONDS, RENDER_BYTES):
                texts, marks = render_jinja_template(
                    conversations=[[dict(message) for message in messages]],
                    tools=[dict(tool) for tool in tools] or None,
                    chat_template=self._dated,
                    return_assistant_tokens_mask=self.marks_answers,
                    add_generation_prompt=add_generation_prompt,
                    **switches,
                    **self._special_tokens,
                )
        except LimitReached as error:
            raise DataError(
                f"the tokenizer's chat template does not end: {error} for one conversation. "
                "Give the tokenizer another chat template"
            ) from None
        except RecursionError:
            raise RowError(None, "the chat template calls itself without end") from None
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise RowError(None, f"the chat template refuses these messages: {error}") from None
        return texts[0], [tuple(span) for span in marks[0]] if self.marks_answers else []


def _require_no_powers(source: str) -> None:
    """Refuse a template that computes a power: 9**9**9 is one step that takes hours.

    Raises:
        DataError: if it does.
    """
    try:
        tokens = list(jinja2.Environment().lex(source))
    except jinja2.TemplateError:
        return  # reported when it is rendered
    if any(kind == "operator" and text == "**" for _, kind, text in tokens):
        raise DataError(
            "the tokenizer's chat template computes a power (**), which may never end. Give the "
            "tokenizer another chat template"
        )
