"""The HTML page of a report, of the parts in templates/page.html.

Arguments are plain text, which is escaped; what is returned is HTML, which is not escaped again.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
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


@functools.cache
def _parts() -> Any:
    import jinja2  # Most programs that import this draw no page.

    loader = jinja2.PackageLoader("expandr_jax.report")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Environment(loader=loader, **options).get_template("page.html").module


def render(title: str, lead: str, sections: Mapping[str, Markup]) -> str:
    """The whole page.

    Args:
        title: Its name.
        lead: The sentence under the title.
        sections: The contents of each section by its title.
    """
    slugs = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in sections]
    named = [(slug, *section) for slug, section in zip(slugs, sections.items(), strict=True)]
    return str(_parts().page(title, lead, named))


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph, of CSS class `kind` where given."""
    return _parts().paragraph(text, kind)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table, whose cells may be `Bold`; the first cell of a row names it."""
    return _parts().table(caption, header, rows)


def figures(charts: Mapping[str, str]) -> Markup:
    """SVG charts, by caption, side by side where there is room."""
    return _parts().figures(charts)


def cards(note: str, several: Sequence[Card]) -> Markup | None:
    """Cards side by side under a note, or None where there are none."""
    return _parts().cards(note, several) if several else None


def details(summary: str, text: str) -> Markup:
    """Preformatted text that unfolds."""
    return _parts().details(summary, text)


def clip(text: str, length: int) -> str:
    """A text's beginning, which ends with a whole word."""
    text = text.strip()
    return text if len(text) <= length else text[:length].rsplit(maxsplit=1)[0] + " …"
