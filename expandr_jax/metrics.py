"""Rankings and judgements in TREC's formats, their measures, and tests between systems.

One ranking for every measure. trec_eval ignores a run's rank column: it sorts by score, as float32,
and puts equal scores in descending order of document id. `rank_documents` does the same and then
lowers each repeated score by the least that float32 can tell, so that a run we write holds strictly
decreasing scores and every tool reads the same order from it. `evaluate` scores that order. Hence
the tie rule of MRR@10, which trec_eval lacks and which ir-measures takes from MS MARCO's script
(ascending ids), is trec_eval's as well: equal scores in descending order of document id.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import ir_measures
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.records import decode_line, read_lines, write_text

RunScores = Mapping[str, Mapping[str, float]]  # query id -> document id -> score
Judgements = Mapping[str, Mapping[str, int]]  # query id -> document id -> relevance; 0 is none

METRICS = ("ndcg@10", "mrr@10", "recall@100", "map")  # Every table has them.
CHOSEN_BY = "ndcg@10"  # The metric that settings are chosen by, on dev.

# Our names and those of ir-measures.
_IR_MEASURES = {"ndcg": "nDCG", "mrr": "RR", "recall": "R", "map": "AP", "p": "P"}
_MOST_CUTOFF = 10**9
_RESAMPLES_AT_ONCE = 1 << 22  # values drawn at a time: 32 MiB


def evaluate(
    run: RunScores,
    qrels: Judgements,
    names: Sequence[str] = METRICS,
) -> dict[str, dict[str, float]]:
    """Scores a run against judgements, by ir-measures.

    Args:
        run: scores by query and document; queries without judgements are ignored, and equal
            scores are ordered as the module's docstring says.
        qrels: judgements; a query that the run lacks, or that has no relevant document, counts 0.
        names: "ndcg", "mrr", "recall", "map" or "p", with "@" and a cut-off where wanted, or any
            measure as ir-measures spells it, such as "Success@5" or "Rprec".

    Returns:
        measure name -> query id -> value, with every query of `qrels` in its order.

    Raises:
        UserError: an unknown measure, no judgements, or a score that is not finite.
    """
    if not qrels:
        raise UserError("no judgements to evaluate against; expected at least one query")
    measures = {name: _measure(name) for name in names}
    # Ranks as scores: whatever a provider does with ties, there are none.
    ranked = {
        query: {
            document: -float(rank) for rank, (document, _) in enumerate(_ranking(query, scores))
        }
        for query, scores in run.items()
        if query in qrels and scores
    }
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in measures.values()}
    for value in ir_measures.iter_calc(
        list(values), {q: dict(d) for q, d in qrels.items()}, ranked
    ):
        values[value.measure][value.query_id] = float(value.value)
    return {name: values[measure] for name, measure in measures.items()}


def mean(values: Mapping[str, float]) -> float:
    """Returns the mean over queries of one measure's values."""
    return float(np.mean(list(values.values())))


def rank_documents(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Orders one query's documents as trec_eval does, best first, with strictly falling scores.

    Args:
        scores: document id -> score, finite as float32.

    Returns:
        (document id, score) pairs; each score is a float32 value, lowered by the least possible
        where it would repeat the one before it.
    """
    with np.errstate(over="ignore"):
        narrow = np.array(list(scores.values()), dtype=np.float64).astype(np.float32)
    for document, finite in zip(scores, np.isfinite(narrow), strict=True):
        if not finite:
            raise UserError(f"document {document!r} has a score that is not finite; it has no rank")
    ranking = sorted(zip(narrow.tolist(), scores, strict=True), reverse=True)
    lowered = np.array([score for score, _ in ranking], np.float32)
    for i in range(1, len(lowered)):
        if lowered[i] >= lowered[i - 1]:
            # Near 0 the next float32 is subnormal, which some programs read as 0.
            step = np.float32(lowered[i - 1] - np.float32(1e-12))
            lowered[i] = min(np.nextafter(lowered[i - 1], np.float32(-np.inf)), step)
    return [(document, float(score)) for (_, document), score in zip(ranking, lowered, strict=True)]


def write_trec(path: str | os.PathLike, run: RunScores, tag: str) -> None:
    """Writes a run as "qid Q0 docid rank score tag" lines, rank from 1, scores strictly falling.

    Args:
        path: the file, replaced atomically.
        run: scores by query and document.
        tag: name of the system.

    Raises:
        UserError: an id or the tag is empty or holds white space, or a score is not finite.
    """
    _check_id(path, "tag", tag)
    lines = []
    for query, scores in run.items():
        _check_id(path, "query id", query)
        for rank, (document, score) in enumerate(_ranking(query, scores), start=1):
            _check_id(path, "document id", document)
            lines.append(f"{query} Q0 {document} {rank} {score:.9g} {tag}\n")
    write_text(path, "".join(lines))


def as_written(run: RunScores) -> dict[str, dict[str, float]]:
    """A run as `read_trec` has it after `write_trec`."""
    return {
        query: {document: float(f"{score:.9g}") for document, score in _ranking(query, scores)}
        for query, scores in run.items()
        if scores
    }


def read_trec(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Reads a run; the rank column is ignored, as trec_eval ignores it.

    Raises:
        UserError: naming file and line, for a line that is not six columns with a finite score,
            or a document that stands twice for a query.
    """
    run: dict[str, dict[str, float]] = {}
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        columns = decode_line(where, line).split()
        if not columns:
            continue
        if len(columns) != 6:
            raise UserError(
                f"{where}: {len(columns)} columns; expected 6: qid Q0 docid rank score tag"
            )
        query, _, document, _, score, _ = columns
        try:
            value = float(score)
        except ValueError:
            value = np.nan
        if not abs(value) <= float(np.finfo(np.float32).max):
            raise UserError(f"{where}: score {score!r}; expected a finite number")
        if document in run.setdefault(query, {}):
            raise UserError(f"{where}: document {document} stands twice for query {query}")
        run[query][document] = value
    return run


def write_qrels(path: str | os.PathLike, qrels: Judgements) -> None:
    """Writes judgements as "qid 0 docid relevance" lines, atomically.

    Raises:
        UserError: an id is empty or holds white space.
    """
    lines = []
    for query, judged in qrels.items():
        _check_id(path, "query id", query)
        for document, relevance in judged.items():
            _check_id(path, "document id", document)
            lines.append(f"{query} 0 {document} {int(relevance)}\n")
    write_text(path, "".join(lines))


def paired_test(
    a: Mapping[str, float] | Sequence[float], b: Mapping[str, float] | Sequence[float]
) -> dict[str, float | str]:
    """Tests the mean difference of two systems over the same queries by a paired t-test.

    Args:
        a: values by query id, or in the order of the queries.
        b: the same for the other system.

    Returns:
        "difference" of the means (a - b), two-sided "p_value", and "test". The p-value is 1 where
        nothing can be said (identical values, or a single query) and 0 where every query differs
        by the same amount.

    Raises:
        UserError: the queries differ, there are none, or a value is not finite.
    """
    differences = _differences(a, b)
    difference = float(np.mean(differences))
    if len(differences) == 1 or not differences.any():
        p_value = 1.0
    elif np.ptp(differences) <= 1e-12 * abs(difference):
        p_value = 0.0
    else:
        import scipy.stats  # Takes half a second, and most programs compare nothing.

        p_value = float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)
    return {"difference": difference, "p_value": p_value, "test": "paired t-test"}


def randomisation_test(
    a: Mapping[str, float] | Sequence[float],
    b: Mapping[str, float] | Sequence[float],
    seed: int = 0,
    samples: int = 10_000,
) -> dict[str, float | str]:
    """Tests the mean difference by swapping the two systems' values at random, query by query.

    Args:
        a: values by query id, or in the order of the queries.
        b: the same for the other system.
        seed: seed of the swaps.
        samples: random assignments drawn; the p-value is (1 + as extreme) / (1 + samples).

    Returns:
        "difference", two-sided "p_value" and "test", as `paired_test` does.
    """
    differences = _differences(a, b)
    observed = abs(differences.sum())
    random = np.random.default_rng(seed)
    extreme = 0
    for count in _chunks(samples, len(differences)):
        signs = random.integers(0, 2, (count, len(differences)), dtype=np.int8) * 2 - 1
        # A hair's tolerance: the same sum in another order is as extreme.
        extreme += int((abs(signs @ differences) >= observed * (1 - 1e-12)).sum())
    return {
        "difference": float(np.mean(differences)),
        "p_value": (1 + extreme) / (1 + samples),
        "test": "randomisation test",
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several comparisons by Holm's step-down method.

    Args:
        p_values: one a comparison.

    Returns:
        In the same order: the i-th smallest of m times m - i + 1, never below a smaller one's,
        at most 1.

    References:
        Holm (1979), Scandinavian Journal of Statistics 6.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    scaled = values[order] * (len(values) - np.arange(len(values)))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, confidence: float = 0.95, samples: int = 10_000
) -> tuple[float, float]:
    """Returns the percentile bootstrap confidence interval of a mean.

    Args:
        values: one a query, at least one.
        seed: seed of the resampling.
        confidence: share of resampled means inside the interval.
        samples: resamples drawn.
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise UserError("no values to resample; expected at least one")
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[random.integers(0, len(values), (count, len(values)))].mean(axis=1)
            for count in _chunks(samples, len(values))
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def measure_key(name: str) -> str:
    """What names of one measure have in common, as "ndcg@10" and "nDCG@10".

    Raises:
        UserError: There is no such measure.
    """
    return str(_measure(name))


def _measure(name: str) -> ir_measures.Measure:
    base, at, cutoff = name.partition("@")
    # trec_eval ends the process at a cutoff of 0, and counts in 32 or 64 bits.
    if at and cutoff.isdecimal() and not 1 <= int(cutoff[:20]) <= _MOST_CUTOFF:
        raise UserError(f"measure {name!r}: expected a cutoff from 1 to {_MOST_CUTOFF}")
    spelled = _IR_MEASURES.get(base.lower(), base) + ("@" + cutoff if cutoff else "")
    try:
        measure = ir_measures.parse_measure(spelled)
        if ir_measures.DefaultPipeline.supports(measure):
            return measure
    except Exception:  # whatever its parser meets in a misspelt name
        pass
    raise UserError(
        f"measure {name!r} is unknown; expected ndcg@10, mrr@10, recall@100, map, p@5 "
        "or a name of ir-measures"
    )


def _ranking(query: str, scores: Mapping[str, float]) -> list[tuple[str, float]]:
    try:
        return rank_documents(scores)
    except UserError as error:
        raise UserError(f"query {query!r}: {error}") from error


def _check_id(path: str | os.PathLike, kind: str, value: str) -> None:
    if not value or any(character.isspace() for character in value):
        raise UserError(f"{path}: {kind} {value!r} is empty or holds white space; TREC has no room")


def _differences(
    a: Mapping[str, float] | Sequence[float], b: Mapping[str, float] | Sequence[float]
) -> np.ndarray:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            raise UserError("the two systems were scored on different queries; pair them first")
        a, b = list(a.values()), [b[query] for query in a]
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise UserError(f"values of shapes {a.shape} and {b.shape} cannot be paired")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("a value is not finite; nothing can be tested")
    return a - b


def _chunks(samples: int, width: int) -> Iterator[int]:
    size = max(1, _RESAMPLES_AT_ONCE // width)
    for start in range(0, samples, size):
        yield min(size, samples - start)
