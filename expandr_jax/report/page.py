"""The HTML page of a report, of the parts in templates/page.html."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup


@dataclasses.dataclass(frozen=True)
class Card:
    """A query before and after.

    Attributes:
        title: The query.
        trend: "better", "worse" or "same".
        change: From what to what it changed.
        note: Stands beside the change.
        quote: What was written for the query, if anything.
        document: Text that unfolds: the relevant document; None: there is none.
    """

    title: str
    trend: str
    change: str
    note: str
    quote: str
    document: str | None = None


@dataclasses.dataclass(frozen=True)
class SampledText:
    """A text as a generator wrote it.

    Attributes:
        query: What it was written for.
        text: The text.
        reward: What it was worth, in words.
    """

    query: str
    text: str
    reward: str


@functools.cache
def template(package: str, name: str) -> Any:
    """A file of a package's templates, whose arguments are plain text, which is escaped."""
    import jinja2  # Most programs that import this draw no page.

    loader = jinja2.PackageLoader(package)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Environment(loader=loader, **options).get_template(name)


def parts() -> Any:
    """The template's macros, as `parts().table(caption, header, rows)`.

    Each returns `Markup`, which is not escaped again.
    """
    return template("expandr_jax.report", "page.html").module


def render_page(title: str, lead: str, sections: Mapping[str, Markup]) -> str:
    """The whole page: its name, the sentence under it, and each section by its title."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in sections]
    named = [(slug, *section) for slug, section in zip(slugs, sections.items(), strict=True)]
    return str(parts().page(title, lead, named))


def clip(text: str, length: int) -> str:
    """A text's beginning, which ends with a whole word."""
    text = text.strip()
    return text if len(text) <= length else text[:length].rsplit(maxsplit=1)[0] + " …"
