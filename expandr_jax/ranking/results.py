"""What results.json says of systems: means, over several sets too, and tests between pairs."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics
from expandr_jax.ranking.listwise import answers_remark

QueryMetrics = Mapping[str, Mapping[str, Mapping[str, float]]]  # system -> metric -> query -> value
HARDEST = 0.25  # Share of the test queries that are told of alone.


def summary(
    dataset: str,
    values: QueryMetrics,
    pairs: Sequence[tuple[str, str]],
    recalls: Sequence[Mapping[str, Any] | None] = (),
    said: Sequence[str] = (),
    answers: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The contents of results.json, nothing being chosen.

    Args:
        dataset: Its name.
        values: At least one system's.
        pairs: (system, baseline), each tested under every metric.
        recalls: What indexes find that may miss documents; see `Ranker.index_recall`.
        said: What a reader of the rows has to know; see `remarks`.
        answers: Counts of listwise systems, {"system", "answers", ...}; remarked on, too.
    """
    said = [*said, *map(answers_remark, answers)]
    first = next(iter(values.values()))
    return {
        "dataset": dataset,
        "queries": len(next(iter(first.values()))),
        "chosen": {},
        "rows": [
            {"system": name, **{m: round(metrics.mean(of[m]), 6) for m in of}}
            for name, of in values.items()
        ],
        "significance": compared(values, pairs),
        **({"index_recall": found} if (found := list(filter(None, recalls))) else {}),
        **({"listwise": [*answers]} if answers else {}),
        **({"remarks": said} if said else {}),
    }


def compared(values: QueryMetrics, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Entries of "significance": each pair (system, baseline), tested under every metric."""
    return [
        paired(system, baseline, metric, values[system][metric], values[baseline][metric])
        for system, baseline in pairs
        for metric in values[system]
    ]


def paired(
    system: str, baseline: str, metric: str, ours: Mapping[str, float], theirs: Mapping[str, float]
) -> dict[str, Any]:
    """An entry of "significance", of both systems' values by query."""
    test = metrics.paired_test(ours, theirs)
    return {"system": system, "baseline": baseline, "metric": metric, **test}


def hardest(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    share: float = HARDEST,
) -> dict[str, int | None]:
    """The share of all judged queries, one at least, that a run ranks worst, the worst first.

    Each with the rank of its first relevant document; queries without one in the run, None, are
    the worst, and ids decide between equal ones.
    """

    def rank(query: str) -> int | None:
        ranked = enumerate(metrics.rank_documents(run.get(query, {})), start=1)
        return next((i for i, (found, _) in ranked if qrels[query].get(found, 0) > 0), None)

    ranks = {query: rank(query) for query in qrels}
    worst = sorted(ranks, key=lambda query: (-(ranks[query] or math.inf), query))
    return {query: ranks[query] for query in worst[: max(1, round(share * len(worst)))]}


def of_some(
    values: QueryMetrics, queries: Collection[str], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """ "queries", "rows" and "significance" as in results.json, of some of the queries."""
    part = {
        system: {metric: {q: of[metric][q] for q in queries} for metric in of}
        for system, of in values.items()
    }
    results = summary("", part, pairs)
    return {name: results[name] for name in ("queries", "rows", "significance")}


def gate_entry(
    system: str,
    expanded: Mapping[str, bool],
    gated: Mapping[str, float],
    always: Mapping[str, float],
    never: Mapping[str, float],
) -> dict[str, Any]:
    """An entry of "gates": a gated system beside expanding always, never and at random.

    Args:
        system: Its name.
        expanded: Whether the gate had each query expanded.
        gated, always, never: Values of `CHOSEN_BY` by query.

    Returns:
        Beside the means "random", what is to be expected where as many queries as the gate expands
        are drawn at random: the mean of always and never by that share.
    """
    share = float(np.mean([*expanded.values()]))
    means = [metrics.mean(values) for values in (gated, always, never)]
    means.append(share * means[1] + (1 - share) * means[2])
    told = zip(("gated", "always", "never", "random"), means, strict=True)
    tests = {
        "always": metrics.paired_test(gated, always),
        "never": metrics.paired_test(gated, never),
    }
    return {
        "system": system,
        "metric": metrics.CHOSEN_BY,
        "share": round(share, 6),
        **{name: round(mean, 6) for name, mean in told},
        **{f"p_value_{name}": test["p_value"] for name, test in tests.items()},
    }


def mean_over_sets(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sets, where sets named "cqadupstack/android" and so on count as one together.

    Returns:
        "sets": name -> rows as in results.json; "rows": their means.
    """
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition("/")[0], []).append(result["rows"])
    sets = {name: _mean_rows(several) for name, several in groups.items()}
    return {"sets": sets, "rows": _mean_rows(list(sets.values()))}


def _mean_rows(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    names = [name for name in tables[0][0] if name != "system"]
    return [
        {
            "system": rows[0]["system"],
            **{m: round(float(np.mean([row[m] for row in rows])), 6) for m in names},
        }
        for rows in zip(*tables, strict=True)
    ]


def remarks(
    system: str, run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """What a reader of a system's row has to know, a sentence each.

    That at least half of the queries find nothing: BM25 does where the queries are in a language
    that the documents are not in. And that queries find the document of their own id, where that
    changes their nDCG@10: in ArguAna it is the query itself, and BEIR's evaluation leaves it out;
    elsewhere ids coincide by chance.

    Args:
        system: Its name.
        run: Its scores, query -> document -> score.
        qrels: Judgements of all queries.
    """
    said = []
    nothing = sum(not run.get(query) for query in qrels)
    if 2 * nothing >= len(qrels):
        said.append(f"{system}: {nothing:,} of {len(qrels):,} queries find no document")
    if found := sum(query in documents for query, documents in run.items()):
        others = {q: {d: s for d, s in documents.items() if d != q} for q, documents in run.items()}
        before, after = (
            f"{metrics.mean(metrics.evaluate(scores, qrels, ['ndcg@10'])['ndcg@10']):.4f}"
            for scores in (run, others)
        )
        if before != after:
            said.append(
                f"{system}: {found:,} of {len(qrels):,} queries find the document of their own id; "
                f"without these nDCG@10 is {after}, not {before} (evaluation.drop_identical_ids)"
            )
    return said
