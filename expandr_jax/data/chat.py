"""Chat templates, rendered the same on any day."""

import datetime
import string
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# In the place of transformers' function, which asks the clock. Templates are given data alone.
_CLOCK = """\
{%- macro strftime_now(format) -%}
{%- for part in format.replace("%%", "%\\0").split("%") -%}
{%- if loop.first -%}{{ part }}
{%- elif part[0] == "-" -%}{{ today_as[part[:2]] + part[2:] }}
{%- else -%}{{ today_as[part[0]] + part[1:] }}
{%- endif -%}{%- endfor -%}
{%- endmacro -%}
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
    if "strftime_now" in tokenizer.chat_template:
        start = datetime.datetime.combine(today, datetime.time())
        codes = [*string.ascii_letters, *("-" + letter for letter in string.ascii_letters)]
        options |= {
            "chat_template": _CLOCK + tokenizer.chat_template,
            "today_as": {"\0": "%", **{code: start.strftime("%" + code) for code in codes}},
        }
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
