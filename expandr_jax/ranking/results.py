"""What results.json says of systems: their means, and the tests between pairs of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax import metrics

Values = Mapping[str, Mapping[str, Mapping[str, float]]]  # system -> metric -> query -> value


def summary(dataset: str, values: Values, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The contents of results.json, nothing being chosen.

    Args:
        dataset: Its name.
        values: At least one system's.
        pairs: (system, baseline), each tested under every metric.
    """
    first = next(iter(values.values()))
    return {
        "dataset": dataset,
        "queries": len(next(iter(first.values()))),
        "chosen": {},
        "rows": [
            {"system": name, **{m: round(metrics.mean(of[m]), 6) for m in of}}
            for name, of in values.items()
        ],
        "significance": [
            {
                "system": system,
                "baseline": baseline,
                "metric": metric,
                **metrics.paired_test(values[system][metric], values[baseline][metric]),
            }
            for system, baseline in pairs
            for metric in first
        ],
    }


def identical_ids(
    system: str, run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> str | None:
    """Says how much lies in documents that have their query's id; None where no query finds one.

    In ArguAna such a document is the query itself, and BEIR's evaluation leaves it out; elsewhere
    ids may coincide by chance.

    Args:
        system: Its name.
        run: Its scores, query -> document -> score.
        qrels: Judgements of all queries.
    """
    found = sum(query in documents for query, documents in run.items())
    if not found:
        return None
    others = {q: {d: s for d, s in documents.items() if d != q} for q, documents in run.items()}
    before, after = (
        metrics.mean(metrics.evaluate(scores, qrels, ["ndcg@10"])["ndcg@10"])
        for scores in (run, others)
    )
    return (
        f"{system}: {found:,} of {len(qrels):,} queries find the document of their own id; without "
        f"these nDCG@10 is {after:.4f}, not {before:.4f} (evaluation.drop_identical_ids)"
    )
