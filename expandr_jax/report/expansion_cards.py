"""A dozen expansions beside their queries, with the rank of the relevant document."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from expandr_jax import metrics
from expandr_jax.data.beir import read_qrels
from expandr_jax.data.records import read_jsonl
from expandr_jax.report import page

_BEFORE, _AFTER = "expandr-plain", "expandr"  # Systems without and with the expansions shown.
_SHOWN_EACH = 4  # Improvements, losses and others that are shown.
_EXPANSION_CHARACTERS = 700
_DOCUMENT_CHARACTERS = 320


def expansion_cards(workdir: pathlib.Path) -> Markup | None:
    """The HTML of the cards, or None where the run lacks a file that they need.

    Args:
        workdir: Holds runs/, qrels.trec, evaluation/expansions.jsonl and, for the text of the
            relevant document, data/corpus.jsonl.
    """
    paths = [workdir / "runs" / f"{system}.trec" for system in (_BEFORE, _AFTER)]
    needed = [*paths, workdir / "qrels.trec", workdir / "evaluation" / "expansions.jsonl"]
    if not all(path.exists() for path in needed):
        return None
    before, after = (metrics.read_trec(path) for path in paths)
    qrels = read_qrels(workdir / "qrels.trec")
    fields = {"query_id": str, "split": str, "system": str, "query": str, "expansion": str}
    shown: dict[str, Mapping[str, Any]] = {}
    for _, row in read_jsonl(needed[-1], fields):
        if row["split"] == "test" and row["system"] == _AFTER and row["query_id"] in qrels:
            shown.setdefault(row["query_id"], row)
    ranks = {
        query: tuple(_rank(run.get(query, {}), qrels[query]) for run in (before, after))
        for query in shown
    }
    depth = max((len(scores) for run in (before, after) for scores in run.values()), default=0)
    relevant = {query: max(qrels[query], key=qrels[query].get) for query in _pick(ranks)}
    documents = _documents(workdir, set(relevant.values()))
    return page.cards(
        f"Rank of the relevant document without the expansion ({_BEFORE}) and with it ({_AFTER}): "
        "the biggest improvements, the biggest losses, and others drawn by hash.",
        [
            _card(shown[query], ranks[query], depth, documents.get(document))
            for query, document in relevant.items()
        ],
    )


def _pick(ranks: Mapping[str, tuple[int | None, int | None]]) -> list[str]:
    """Queries by the change of the relevant document's 1/rank: best, worst, then by hash."""

    def change(query: str) -> float:
        before, after = ranks[query]
        return (1 / after if after else 0) - (1 / before if before else 0)

    def digest(query: str) -> str:
        return hashlib.sha256(query.encode()).hexdigest()

    ordered = sorted(ranks, key=lambda query: (-change(query), digest(query)))
    gains = [query for query in ordered if change(query) > 0][:_SHOWN_EACH]
    losses = [query for query in reversed(ordered) if change(query) < 0][:_SHOWN_EACH]
    others = [query for query in sorted(ranks, key=digest) if query not in gains + losses]
    return gains + losses + others[: 3 * _SHOWN_EACH - len(gains) - len(losses)]


def _card(
    row: Mapping[str, Any], ranks: tuple[int | None, int | None], depth: int, document: str | None
) -> page.Card:
    before, after = (rank or depth + 1 for rank in ranks)
    trend = "better" if after < before else "worse" if after > before else "same"
    labels = [str(rank) if rank else f"beyond {depth}" for rank in ranks]
    expansion = page.clip(row["expansion"], _EXPANSION_CHARACTERS) or "(empty)"
    if document is not None:
        document = page.clip(document, _DOCUMENT_CHARACTERS)
    return page.Card(row["query"], trend, f"rank {' → '.join(labels)}", trend, expansion, document)


def _rank(scores: Mapping[str, float], judged: Mapping[str, int]) -> int | None:
    """Rank of the first relevant document, from 1."""
    for rank, (document, _) in enumerate(metrics.rank_documents(scores), start=1):
        if judged.get(document, 0) > 0:
            return rank
    return None


def _documents(workdir: pathlib.Path, wanted: set[str]) -> dict[str, str]:
    path = workdir / "data" / "corpus.jsonl"
    if not path.exists():
        return {}
    rows = (row for _, row in read_jsonl(path, {"_id": str, "text": str}) if row["_id"] in wanted)
    return {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}
