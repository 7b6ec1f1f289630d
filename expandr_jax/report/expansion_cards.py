"""A dozen expansions beside their queries, with the rank of the relevant document."""

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
    picked = _pick({query: after[query] - before[query] for query in shown})
    relevant = {query: max(qrels[query], key=qrels[query].get) for query in picked}
    documents = _documents(workdir, set(relevant.values()))
    return parts().cards(
        f"Rank of the relevant document without the expansion ({_BEFORE}) and with it ({_AFTER}): "
        "the biggest improvements, the biggest losses, and others drawn by hash.",
        [
            _card(shown[query], before[query], after[query], depth, documents.get(document))
            for query, document in relevant.items()
        ],
    )


def _pick(change: Mapping[str, float]) -> list[str]:
    """Queries by the change of the relevant document's 1 / rank: best, worst, then by hash."""
    by_hash = sorted(change, key=lambda query: hashlib.sha256(query.encode()).hexdigest())
    ordered = sorted(by_hash, key=lambda query: -change[query])
    gains = [query for query in ordered if change[query] > 0][:_SHOWN_EACH]
    losses = [query for query in reversed(ordered) if change[query] < 0][:_SHOWN_EACH]
    others = [query for query in by_hash if query not in gains + losses]
    return gains + losses + others[: 3 * _SHOWN_EACH - len(gains) - len(losses)]


def _card(
    row: Mapping[str, Any], before: float, after: float, depth: int, document: str | None
) -> Card:
    trend = "better" if after > before else "worse" if after < before else "same"
    labels = [str(round(1 / x)) if x else f"beyond {depth}" for x in (before, after)]
    expansion = clip(row["expansion"], _EXPANSION_CHARACTERS) or "(empty)"
    if document is not None:
        document = clip(document, _DOCUMENT_CHARACTERS)
    return Card(row["query"], trend, f"rank {' → '.join(labels)}", trend, expansion, document)


def _documents(workdir: pathlib.Path, wanted: set[str]) -> dict[str, str]:
    path = workdir / "data" / "corpus.jsonl"
    if not path.exists():
        return {}
    rows = (row for _, row in read_jsonl(path, {"_id": str, "text": str}) if row["_id"] in wanted)
    return {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}
