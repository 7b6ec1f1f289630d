"""The HTML page of a report: its style, tables and figures."""

import html
import re
from collections.abc import Mapping, Sequence

Cell = str | tuple[str, bool]  # text, or text and whether it is bold

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4;
  --tint: #f6f8fa; --quiet: #aab4bf; --series-1: #1f6feb; --series-2: #c4600c; --series-3: #1a7f37;
  --series-4: #8250df; --good: #116329; --bad: #a40e26; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --ink: #e6edf3; --soft: #9aa5b1;
  --line: #30373f; --tint: #171c22; --quiet: #566270; --series-1: #6cb0ff; --series-2: #f0a04b;
  --series-3: #56d364; --series-4: #c297ff; --good: #56d364; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; line-height: 1.35; margin: 0; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; margin: 0 0 1rem; }
.absent { color: var(--soft); font-style: italic; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .92rem; }
a { color: var(--series-1); }
.scroll { overflow-x: auto; margin: 0 0 1.4rem; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem;
  max-width: calc(100vw - 2.2rem); }
th, td { padding: .34rem .9rem .34rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  gap: 1.6rem 2.2rem; margin: 0 0 1.6rem; }
figure { margin: 0; max-width: 38rem; }
figcaption { color: var(--soft); font-size: .92rem; margin-bottom: .3rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; align-items: start; }
article { background: var(--tint); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1rem; }
.rank { margin: .35rem 0 .6rem; font-size: .92rem; font-weight: 600; color: var(--soft); }
.rank span { font-weight: 400; }
.better { color: var(--good); }
.worse { color: var(--bad); }
blockquote { margin: 0; padding-left: .8rem; border-left: 3px solid var(--line); font-size: .92rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: .7rem; font-size: .92rem; }
summary { cursor: pointer; color: var(--soft); }
details p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 0; }
pre { overflow-x: auto; background: var(--tint); padding: 1rem; border-radius: .6rem; }
:focus-visible { outline: 2px solid var(--series-1); outline-offset: 2px; }
@media print { nav { display: none; } }
"""


def render(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """Returns the whole page.

    Args:
        title: plain text, as `lead`.
        lead: the sentence under the title.
        sections: HTML of each section by its plain title.
    """
    links = "".join(f'<a href="#{_slug(name)}">{html.escape(name)}</a>' for name in sections)
    body = "".join(
        f'<section id="{_slug(name)}"><h2>{html.escape(name)}</h2>\n{content}</section>\n'
        for name, content in sections.items()
    )
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f'</head>\n<body>\n<main>\n<h1>{title}</h1>\n<p class="lead">{html.escape(lead)}</p>\n'
        f'<nav aria-label="Sections">{links}</nav>\n{body}</main>\n</body>\n</html>\n'
    )


def paragraph(text: str, kind: str = "") -> str:
    """Returns plain text as a paragraph, of CSS class `kind` where given."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Returns a table of plain text; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(row[0]))}</th>{"".join(map(_cell, row[1:]))}</tr>\n'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f"<table><caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def figures(charts: Mapping[str, str]) -> str:
    """Returns SVG charts, by caption, side by side where there is room."""
    parts = "".join(
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>\n"
        for caption, svg in charts.items()
    )
    return f'<div class="figures">{parts}</div>\n'


def _cell(cell: Cell) -> str:
    text, bold = cell if isinstance(cell, tuple) else (cell, False)
    text = html.escape(text)
    return f"<td><strong>{text}</strong></td>" if bold else f"<td>{text}</td>"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
