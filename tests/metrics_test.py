"""Measures against hand-computed values and trec_eval's binding; formats; tests of significance."""

import math
import random

import numpy as np
import pytest
import pytrec_eval
import scipy.stats

from expandr_jax import metrics
from expandr_jax.data.beir import read_qrels
from expandr_jax.errors import UserError
from expandr_jax.search import search_named
from tests.beir_test import mutate


def test_measures_of_a_ranking_worked_by_hand():
    qrels = {"q1": {"a": 2, "b": 1, "z": 1}, "q2": {"c": 1}, "missing": {"a": 1}}
    run = {
        "q1": {"x": 9.0, "a": 8.0, "y": 7.0, "b": 6.0},  # relevant at ranks 2 and 4; z not found
        "q2": {f"d{i:02}": 30.0 - i for i in range(10)} | {"c": 1.0},  # relevant at rank 11
        "not judged": {"a": 1.0},
    }
    values = metrics.evaluate(run, qrels, ("ndcg@10", "mrr@10", "recall@100", "map", "p@5"))
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    expected = {
        "ndcg@10": ((2 / math.log2(3) + 1 / math.log2(5)) / ideal, 0.0, 0.0),
        "mrr@10": (1 / 2, 0.0, 0.0),
        "recall@100": (2 / 3, 1.0, 0.0),
        "map": ((1 / 2 + 2 / 4) / 3, 1 / 11, 0.0),
        "p@5": (2 / 5, 0.0, 0.0),
    }
    assert list(values) == list(expected)
    for name, per_query in values.items():
        assert list(per_query) == ["q1", "q2", "missing"]
        np.testing.assert_allclose(list(per_query.values()), expected[name], atol=1e-9)
        assert metrics.mean(per_query) == pytest.approx(sum(expected[name]) / 3)


def _random_case(seed):
    """A run with ties, unjudged documents, queries without judgements and judged ones missing."""
    random = np.random.default_rng(seed)
    documents = [f"d{i}" for i in range(40)]
    qrels, run = {}, {}
    for query in (f"q{i}" for i in range(12)):
        judged = random.choice(documents, random.integers(1, 10), replace=False)
        qrels[query] = {str(d): int(random.integers(0, 4)) for d in judged}
        found = random.choice(documents, random.integers(0, 30), replace=False)
        scores = random.choice([random.integers(-2, 3), random.normal()], len(found))
        scores = scores + random.integers(0, 3, len(found)) * 1e-9  # ties as float32 only
        run[query] = {str(d): float(s) for d, s in zip(found, scores, strict=True)}
    for query in random.choice(list(qrels), 3, replace=False):
        del run[str(query)]
    run["unjudged"] = {"d1": 1.0}
    return run, qrels


def _trec_order(scores):
    return sorted(scores, key=lambda d: (np.float32(scores[d]), d), reverse=True)


@pytest.mark.parametrize("seed", range(50))
def test_every_measure_equals_trec_evals_binding(seed, tmp_path):
    run, qrels = _random_case(seed)
    names = {
        "ndcg@10": "ndcg_cut_10",
        "recall@100": "recall_100",
        "map": "map",
        "p@5": "P_5",
        "Rprec": "Rprec",
        "mrr": "recip_rank",
    }
    values = metrics.evaluate(run, qrels, [*names, "mrr@10"])
    metrics.write_trec(tmp_path / "a.trec", run, "a")
    written = metrics.read_trec(tmp_path / "a.trec")
    judge = pytrec_eval.RelevanceEvaluator(qrels, set(names.values()))
    for given in (run, written):  # what the library scores is what the file holds
        theirs = judge.evaluate(given)
        for name, trec_name in names.items():
            for query in qrels:
                expected = theirs[query][trec_name] if query in theirs else 0.0
                assert values[name][query] == pytest.approx(expected, abs=1e-6), (name, query)
    for query, judged in qrels.items():
        ranking = _trec_order(run.get(query, {}))[:10]
        ranks = [r for r, d in enumerate(ranking, 1) if judged.get(d, 0) > 0]
        assert values["mrr@10"][query] == pytest.approx(1 / ranks[0] if ranks else 0.0)
    assert metrics.evaluate(written, qrels, [*names, "mrr@10"]) == values


def test_a_written_run_is_strictly_decreasing_and_stable(tmp_path):
    run = {
        "q": {
            "b": 0.0,
            "a": 0.0,
            "c": -0.0,
            "d": 1.0,
            "e": 1.0,
            "f": np.nextafter(np.float32(1), 0),
        }
    }
    path = tmp_path / "tied.trec"
    metrics.write_trec(path, run, "tied")
    rows = [line.split() for line in path.read_text().splitlines()]
    assert [row[2] for row in rows] == ["e", "d", "f", "c", "b", "a"]
    assert [row[3] for row in rows] == [str(i) for i in range(1, 7)]
    assert {(row[1], row[5]) for row in rows} == {("Q0", "tied")}
    scores = np.array([np.float32(row[4]) for row in rows])
    assert (np.diff(scores) < 0).all()
    assert np.abs(scores - [1, 1, 1, 0, 0, 0]).max() < 1e-6
    before = path.read_bytes()
    metrics.write_trec(path, metrics.read_trec(path), "tied")
    assert path.read_bytes() == before


def test_search_results_become_a_run():
    found = np.array([[2.0, 0.0], [1.0, 0.5]]), np.array([[1, 0], [0, 1]])
    names = {"query_ids": ["q1", "q2"], "queries": None, "document_ids": ["a", "b"], "depth": 2}
    run = search_named(lambda *_: found, **names, drop_identical_ids=False, above=0)
    assert run == {"q1": {"b": 2.0}, "q2": {"a": 1.0, "b": 0.5}}


def test_judgements_round_trip(tmp_path):
    qrels = {"q1": {"a": 1, "b": 0}, "q2": {"ü": 3}}
    metrics.write_qrels(tmp_path / "qrels.trec", qrels)
    assert (tmp_path / "qrels.trec").read_text().splitlines()[0] == "q1 0 a 1"
    assert read_qrels(tmp_path / "qrels.trec") == qrels


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (metrics.read_trec, b"q Q0 d 1 2.0 t\nq Q0 e 2\n", ":2: 4 columns"),
        (metrics.read_trec, b"q Q0 d 1 high t\n", ":1: score 'high'"),
        (metrics.read_trec, b"q Q0 d 1 nan t\n", ":1: score 'nan'"),
        (metrics.read_trec, b"q Q0 d 1 1e99 t\n", ":1: score '1e99'"),
        (metrics.read_trec, b"q Q0 d 1 2 t\n\nq Q0 d 2 1 t\n", ":3: document d stands twice"),
        (metrics.read_trec, b"q Q0 \xff 1 2 t\n", ":1: not UTF-8"),
        (read_qrels, b"q 0 d 1.5\n", ":1: grade '1.5'"),
        (read_qrels, b"q 0 d 1\nq 0 d 0\n", ":2: 'q' and 'd' were judged otherwise"),
        (read_qrels, b"q 0 d\n", ":1: 3 columns"),
    ],
)
def test_a_bad_line_is_named(tmp_path, read, content, message):
    path = tmp_path / "bad.trec"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert f"{path}{message}" in str(error.value)


@pytest.mark.parametrize("read", [metrics.read_trec, read_qrels])
def test_200_mutations_end_in_one_line_or_are_read(tmp_path, read):
    path, rng = tmp_path / "file.trec", random.Random(0)
    ids = [(f"q{i // 5}", f"d{i}") for i in range(20)]
    if read is metrics.read_trec:
        lines = [f"{q} Q0 {d} {i % 5 + 1} {20.5 - i} tag\n" for i, (q, d) in enumerate(ids)]
    else:
        lines = [f"{q} 0 {d} {i % 3}\n" for i, (q, d) in enumerate(ids)]
    refused = 0
    for _ in range(200):
        path.write_bytes(mutate("".join(lines).encode(), rng))
        complaint = f"{path}:"
        try:
            read(path)
        except UserError as error:
            complaint = str(error)
            refused += 1
        assert complaint.startswith(f"{path}:")
        assert "\n" not in complaint
    assert refused > 60


def test_what_trec_cannot_hold_is_refused(tmp_path):
    for run in ({"q 1": {"d": 1.0}}, {"q": {"": 1.0}}, {"q": {"d": math.nan}}, {"q": {"d": 1e99}}):
        with pytest.raises(UserError):
            metrics.write_trec(tmp_path / "run.trec", run, "tag")
    with pytest.raises(UserError, match="tag"):
        metrics.write_trec(tmp_path / "run.trec", {}, "two words")
    with pytest.raises(UserError, match="cannot read"):
        metrics.read_trec(tmp_path / "absent.trec")
    assert not list(tmp_path.iterdir())


def test_unknown_measures_and_empty_judgements_are_refused():
    odd = ("ndgc@10", "ndcg@ten", "RBP(p=0.9)", "", "recall")
    for name in (*odd, "ndcg@0", "p@0", "ndcg@-1", "mrr@0", f"ndcg@{10**23}"):
        with pytest.raises(UserError, match="measure"):
            metrics.evaluate({}, {"q": {"d": 1}}, [name])
    with pytest.raises(UserError, match="judgements"):
        metrics.evaluate({}, {})


def test_paired_t_test_equals_scipy_and_is_defined_at_the_edges():
    random = np.random.default_rng(0)
    a, b = random.random(30), random.random(30)
    result = metrics.paired_test(a, b)
    assert result["p_value"] == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert result["difference"] == pytest.approx((a - b).mean())
    by_query = {str(i): v for i, v in enumerate(a)}, {str(i): v for i, v in enumerate(b)}
    shuffled = dict(reversed(by_query[1].items()))
    assert metrics.paired_test(by_query[0], shuffled)["p_value"] == pytest.approx(result["p_value"])
    assert metrics.paired_test(a, a) == {"difference": 0, "p_value": 1, "test": "paired t-test"}
    assert metrics.paired_test(a + 0.25, a)["p_value"] == 0.0
    assert metrics.paired_test([1.0], [0.0])["p_value"] == 1.0
    for pair in (([], []), ([1, 2], [1]), ([math.nan], [1]), ({"a": 1}, {"b": 1})):
        with pytest.raises(UserError):
            metrics.paired_test(*pair)


def test_randomisation_test_approaches_the_exact_one():
    a, b = [0.9, 0.8, 0.7, 0.9, 0.6, 0.4], [0.5, 0.6, 0.2, 0.3, 0.5, 0.6]
    exact = scipy.stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples"
    ).pvalue
    result = metrics.randomisation_test(a, b, seed=1)
    assert result["p_value"] == pytest.approx(exact, abs=0.02)
    assert result == metrics.randomisation_test(a, b, seed=1)
    assert metrics.randomisation_test(a, a)["p_value"] == 1.0


def test_holm_on_a_worked_example():
    # In order: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which may not fall below 0.06.
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert metrics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert metrics.holm([0.02]) == [0.02]
    assert metrics.holm([]) == []


def test_holm_rejects_what_its_steps_reject():
    random = np.random.default_rng(0)
    for _ in range(50):
        values = random.beta(0.3, 2, size=random.integers(1, 12))
        rejected = set()
        for step, index in enumerate(np.argsort(values)):
            if values[index] > 0.05 / (len(values) - step):
                break
            rejected.add(int(index))
        assert {i for i, p in enumerate(metrics.holm(values)) if p <= 0.05} == rejected


def test_bootstrap_interval_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = metrics.bootstrap_interval(values, seed=2)
    assert (low, high) == metrics.bootstrap_interval(values, seed=2)
    margin = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - margin, abs=0.03)
    assert high == pytest.approx(values.mean() + margin, abs=0.03)
    assert metrics.bootstrap_interval([0.5]) == (0.5, 0.5)
    with pytest.raises(UserError):
        metrics.bootstrap_interval([])
