"""A dozen expansions beside their queries, with the rank of the relevant document."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from expandr_jax import metrics
from expandr_jax.data.beir import read_qrels
from expandr_jax.files.records import read_jsonl
from expandr_jax.report.page import Card, clip, parts

_BEFORE, _AFTER = "expandr-plain", "expandr"  # Systems without and with the expansions shown.
_SHOWN_EACH = 4  # Improvements, losses and others that are shown.
_EXPANSION_CHARACTERS = 700
_DOCUMENT_CHARACTERS = 320


def expansion_cards(workdir: pathlib.Path) -> Markup | None:
    """The HTML of the cards, or None where the run lacks a file that they need.

    The text of the relevant document is shown where the run has data/corpus.jsonl.
    """
    picked = _picked(workdir)
    if picked is None:
        return None
    documents = _documents(workdir, {row.relevant for row in picked.rows})
    return parts().cards(
        f"Rank of the relevant document without the expansion ({_BEFORE}) and with it ({_AFTER}): "
        "the biggest improvements, the biggest losses, and others drawn by hash.",
        [_card(row, picked.depth, documents.get(row.relevant)) for row in picked.rows],
    )


def shown_queries(workdir: pathlib.Path) -> list[str]:
    """The queries of the cards; none where the run lacks a file that they need."""
    picked = _picked(workdir)
    return [] if picked is None else [row.query for row in picked.rows]


@dataclasses.dataclass(frozen=True)
class _Row:
    """A query, its expansion, 1 / rank of its relevant document before and after, and that one."""

    query: str
    expansion: str
    before: float
    after: float
    relevant: str


@dataclasses.dataclass(frozen=True)
class _Picked:
    rows: list[_Row]
    depth: int


def _picked(workdir: pathlib.Path) -> _Picked | None:
    """The queries that are shown; None where the run lacks a file."""
    paths = [workdir / "runs" / f"{system}.trec" for system in (_BEFORE, _AFTER)]
    needed = [*paths, workdir / "qrels.trec", workdir / "evaluation" / "expansions.jsonl"]
    if not all(path.exists() for path in needed):
        return None
    runs = [metrics.read_trec(path) for path in paths]
    qrels = read_qrels(workdir / "qrels.trec")
    fields = {"query_id": str, "split": str, "system": str, "query": str, "expansion": str}
    shown: dict[str, Mapping[str, Any]] = {}
    for _, row in read_jsonl(needed[-1], fields):
        if row["split"] == "test" and row["system"] == _AFTER and row["query_id"] in qrels:
            shown.setdefault(row["query_id"], row)
    # 1 / rank of the first relevant document, 0 where none was found.
    before, after = (metrics.evaluate(run, qrels, ["mrr"])["mrr"] for run in runs)
    depth = max((len(scores) for run in runs for scores in run.values()), default=0)
    rows = [
        _Row(
            shown[query]["query"], shown[query]["expansion"], before[query], after[query],
            max(qrels[query], key=qrels[query].get),
        )
        for query in _pick({query: after[query] - before[query] for query in shown})
    ]  # fmt: skip
    return _Picked(rows, depth)


def _pick(change: Mapping[str, float]) -> list[str]:
    """Queries by the change of the relevant document's 1 / rank: best, worst, then by hash."""
    by_hash = sorted(change, key=lambda query: hashlib.sha256(query.encode()).hexdigest())
    ordered = sorted(by_hash, key=lambda query: -change[query])
    gains = [query for query in ordered if change[query] > 0][:_SHOWN_EACH]
    losses = [query for query in reversed(ordered) if change[query] < 0][:_SHOWN_EACH]
    others = [query for query in by_hash if query not in gains + losses]
    return gains + losses + others[: 3 * _SHOWN_EACH - len(gains) - len(losses)]


def _card(row: _Row, depth: int, document: str | None) -> Card:
    change = row.after - row.before
    trend = "better" if change > 0 else "worse" if change < 0 else "same"
    labels = [str(round(1 / x)) if x else f"beyond {depth}" for x in (row.before, row.after)]
    expansion = clip(row.expansion, _EXPANSION_CHARACTERS) or "(empty)"
    if document is not None:
        document = clip(document, _DOCUMENT_CHARACTERS)
    return Card(row.query, trend, f"rank {' → '.join(labels)}", trend, expansion, document)


def _documents(workdir: pathlib.Path, wanted: set[str]) -> dict[str, str]:
    path = workdir / "data" / "corpus.jsonl"
    if not path.exists():
        return {}
    rows = (row for _, row in read_jsonl(path, {"_id": str, "text": str}) if row["_id"] in wanted)
    return {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}
