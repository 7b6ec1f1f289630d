"""Chat templates, rendered the same on any day."""

from __future__ import annotations

import datetime
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FLAGS = ["-", "_", "0", "^", "#"]  # What may stand before a code's letter.
# In the place of transformers' function, which asks the clock. Templates are given data alone.
_CLOCK = """\
{%- macro strftime_now(format) -%}
{%- for part in format.replace("%%", "%\\0").split("%") -%}
{%- set code = part[:2] if part[:1] in flags else part[:1] -%}
{%- if loop.first -%}{{ part }}
{%- else -%}{{ today_as.get(code, "%" + code) + part[code | length:] }}
{%- endif -%}{%- endfor -%}
{%- endmacro %}
"""


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    today: datetime.date,
    **options: Any,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: Has the chat template.
        messages: {"role", "content"}, one after the other.
        today: What the template takes for the present day; at midnight, if it asks for the time.
        options: Further arguments of transformers' `apply_chat_template`, such as
            `add_generation_prompt`, and variables of the template.

    Raises:
        jinja2.TemplateError: The template refuses the messages.
    """
    # Which of several templates, as transformers: "tool_use" where there are tools, else "default".
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    if "strftime_now" in template:
        start = datetime.datetime.combine(today, datetime.time())
        codes = [flag + letter for flag in ("", *_FLAGS) for letter in string.ascii_letters]
        template = _CLOCK + template
        options |= {
            "flags": _FLAGS,
            "today_as": {"\0": "%", **{code: start.strftime("%" + code) for code in codes}},
        }
    options["chat_template"] = template
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
