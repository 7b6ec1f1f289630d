"""Gates: what they read, how they are fitted, that they help where they can and see dev alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from expandr_jax import metrics
from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl
from expandr_jax.ranking.gate import (
    ALWAYS,
    FOLDS,
    NEVER,
    PENALTY,
    best_threshold,
    fit_gate,
    fit_model,
    fold_of,
    logistic,
    read_gates,
    should_expand,
    write_gates,
)
from expandr_jax.ranking.gate_features import (
    AFTER,
    BEFORE,
    PlainSearch,
    Written,
    features_after,
    features_before,
)
from expandr_jax.ranking.results import gate_entry
from tests import choices_test
from tests.choices_test import SYSTEMS, evaluated, qrels_of

SEARCH = PlainSearch({"a": 0.9, "b": 0.7, "c": 0.5}, {"d": 2.0, "a": 4.0}, [1, 0], 9)


def test_what_is_read_before_generation_by_hand():
    # Deviations of 0.9, 0.7, 0.5 are 0.1633: softmax of 0, -1.2247, -2.4495 is these shares.
    shares = np.array([0.72454, 0.21290, 0.06256])
    assert features_before(SEARCH) == pytest.approx(
        {
            "dense_first": 0.9, "dense_margin": 0.2, "dense_margin_last": 0.4, "dense_mean": 0.7,
            "dense_deviation": 0.163299, "dense_entropy": -(shares * np.log(shares)).sum(),
            "bm25_first": 4, "bm25_margin": 2, "bm25_margin_last": 2, "bm25_mean": 3,
            "bm25_deviation": 1, "bm25_entropy": 0.3653338, "overlap": 0.1, "words": 2,
            "rarity_mean": (math.log(5) + math.log(10)) / 2, "rarity_most": math.log(10),
            "words_unknown": 1,
        },
        abs=1e-4,
    )  # fmt: skip


def test_what_is_read_after_generation_by_hand():
    passages = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    written = Written(np.array([1.0, 0.0]), passages, [4, 8, 6], {"b": 0.8, "a": 0.6})
    after = features_after(SEARCH, written)
    assert {n: after[n] for n in after if n not in features_before(SEARCH)} == pytest.approx(
        {
            "passages": 3, "passage_words": 6, "query_cosine": (1 + math.sqrt(0.5)) / 3,
            "query_cosine_least": 0, "agreement": 2 * math.sqrt(0.5) / 3, "expanded_overlap": 0.2,
            "expanded_overlap_bm25": 0.1, "first_kept": 0, "expanded_first": 0.8,
        }
    )  # fmt: skip
    told = features_after(SEARCH, dataclasses.replace(written, log_probs=[-1.0, -2.5, -4.0]))
    assert told == after | {"log_probability": -2.5}
    none = dataclasses.replace(written, passages=passages[:0], words=[], expanded=SEARCH.dense)
    nothing = features_after(SEARCH, none)
    assert nothing["passages"] == nothing["agreement"] == nothing["query_cosine"] == 0
    assert nothing["first_kept"] == 1


def test_the_first_ten_count_and_a_search_may_find_none():
    longer = {f"d{i}": 1 - i / 100 for i in range(30)}
    shuffled = dict(sorted(longer.items()))
    ten = dict(list(longer.items())[:10])
    of = [features_before(PlainSearch(d, {}, [], 30)) for d in (longer, shuffled, ten)]
    assert of[0] == of[1] == of[2]
    assert of[0]["dense_margin_last"] == pytest.approx(0.09)
    empty = features_before(PlainSearch({}, {}, [], 30))
    assert {*empty.values()} == {0.0}


def test_a_threshold_by_hand():
    chances, gains = np.array([0.3, 0.9, 0.1, 0.8]), np.array([0.3, 0.2, -0.5, -0.1])
    # None 0, the likeliest 0.2, two 0.1, three 0.4, all -0.1.
    assert best_threshold(chances, gains) == pytest.approx(0.2)
    assert best_threshold(chances, -np.abs(gains)) == NEVER
    assert best_threshold(chances, np.abs(gains)) == ALWAYS
    assert best_threshold(chances, np.zeros(4)) == NEVER
    # Queries that the gate cannot tell apart are expanded together.
    assert best_threshold(np.full(4, 0.5), gains) == NEVER
    assert best_threshold(np.zeros(0), np.zeros(0)) == NEVER


@pytest.mark.parametrize("penalty", [0.5, PENALTY])
def test_the_fit_is_scikit_learn_s(penalty):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(64, 17))
    rows[:, 1] = rows[:, 0] + 0.01 * rows[:, 1]
    labels = rows[:, 0] + rng.normal(size=64) > 0.3
    importance = rng.uniform(0, 2, 64)
    weights, intercept = logistic(rows, labels, importance, penalty)
    peer = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)
    peer.fit(rows, labels, sample_weight=importance)
    np.testing.assert_allclose(weights, peer.coef_[0], atol=1e-4)
    assert intercept == pytest.approx(peer.intercept_[0], abs=1e-4)


def test_a_model_is_that_of_standardised_features_weighted_by_what_was_gained():
    rng = np.random.default_rng(1)
    rows = np.stack([100 + 5 * rng.normal(size=50), np.full(50, 3.0)], axis=1)
    gains = np.where(rng.random(50) < 0.3, 0.0, rng.normal(size=50))
    gate = fit_model(("a", "same"), rows, gains)
    scaled = (rows[:, :1] - rows[:, 0].mean()) / rows[:, 0].std()
    importance = np.abs(gains) / np.abs(gains[gains != 0]).mean()
    peer = LogisticRegression(C=1 / PENALTY, tol=1e-10, max_iter=10_000)
    peer.fit(scaled, gains > 0, sample_weight=importance)
    assert gate.weights == pytest.approx((peer.coef_[0, 0], 0.0), abs=1e-4)
    of = {"a": rows[7, 0], "same": 3.0}
    assert gate.probability(of) == pytest.approx(peer.predict_proba(scaled)[7, 1], abs=1e-4)


@pytest.mark.parametrize(("gains", "helps"), [([0.1, 0.3], True), ([-0.1, 0.0], False), ([], None)])
def test_where_all_did_the_same_the_model_says_that(gains, helps):
    gate = fit_model(("a",), np.arange(float(len(gains)))[:, None], np.array(gains))
    assert gate.weights == (0.0,)
    chance = gate.probability({"a": 5.0})
    assert 0 < chance < 1
    if helps is not None:
        assert (chance > 0.5) is helps


def drawn(seed, count, told, helped=0.5):
    """Features and values of queries; the first feature tells those that expansion helps."""
    rng = np.random.default_rng(seed)
    ids = [f"{seed}-{i}" for i in range(count)]
    helps = rng.random(count) < helped
    rows = rng.normal(size=(count, 17))
    rows[:, 0] += told * helps
    gains = np.where(helps, 0.2, -0.2) + 0.1 * rng.normal(size=count)
    features = {q: {f"f{i}": v for i, v in enumerate(r)} for q, r in zip(ids, rows, strict=True)}
    plain = dict(zip(ids, rng.uniform(0.3, 0.6, count), strict=True))
    return features, plain, {q: plain[q] + g for q, g in zip(ids, gains, strict=True)}


def gated_mean(gate, features, plain, expanded):
    return np.mean([expanded[q] if gate.expands(features[q]) else plain[q] for q in features])


@pytest.mark.parametrize("count", [64, 400])
def test_where_expansion_helps_half_and_it_shows_the_gate_beats_both(count):
    gate, test = fit_gate(*drawn(1, count, told=3)), drawn(2, 1000, told=3)
    never, always = (np.mean([*values.values()]) for values in test[1:])
    assert gated_mean(gate, *test) > max(never, always) + 0.05
    assert gate.dev["gated"] > max(gate.dev["never"], gate.dev["always"]) + 0.02
    assert gate.dev["queries"] == count
    assert 0.3 < gate.share < 0.7


def test_where_nothing_shows_the_gate_does_no_harm():
    harm, fallen = [], 0
    for seed in range(10):
        gate, test = fit_gate(*drawn(seed, 64, told=0)), drawn(1000 + seed, 1000, told=0)
        never, always = (np.mean([*values.values()]) for values in test[1:])
        harm.append(gated_mean(gate, *test) - max(never, always))
        fallen += gate.threshold in (ALWAYS, NEVER)
        dev = gate.dev
        if dev["gated"] <= max(dev["never"], dev["always"]):
            assert gate.threshold == (ALWAYS if dev["always"] > dev["never"] else NEVER)
    assert np.mean(harm) > -0.02
    assert fallen >= 6
    # Where it helps all, or nobody, all or none are expanded.
    assert fit_gate(*drawn(3, 64, told=0, helped=0.95)).threshold == ALWAYS
    assert fit_gate(*drawn(3, 64, told=0, helped=0.05)).threshold == NEVER


def test_folds_hang_on_the_id_alone():
    assert [fold_of(f"q{i}") for i in range(6)] == [3, 1, 0, 4, 1, 0]
    counts = np.bincount([fold_of(f"q{i}") for i in range(1000)], minlength=FOLDS)
    assert min(counts) > 150
    features, plain, expanded = drawn(5, 64, told=1)
    other = dict(reversed(features.items()))
    assert fit_gate(other, plain, expanded) == fit_gate(features, plain, expanded)


def test_a_file_of_gates_is_read_as_it_was_written(tmp_path):
    gate = fit_gate(*drawn(1, 64, told=3))
    path = tmp_path / "gates.json"
    write_gates(path, {BEFORE: gate})
    assert read_gates(path, [BEFORE]) == {BEFORE: gate}


BAD = {
    "not there": (None, "No such file"),
    "no JSON": ("{", "no file of gates"),
    "a list": ("[]", "no file of gates"),
    "a number for a gate": ('{"expandr-gated": 3}', "no file of gates"),
    "another gate": ("{}", "expandr-gated is missing"),
    "a field less": ({"weights": ...}, "weights is missing"),
    "a field more": ({"kind": 1}, "kind is unknown"),
    "too few": ({"weights": [1.0]}, "1 weights of 17 features"),
    "a word": ({"means": ["x"] * 17}, "means are no list of finite numbers"),
    "not finite": ({"intercept": float("nan")}, "intercept is no finite number"),
    "no deviation": ({"deviations": [0.0] * 17}, "a deviation is not above 0"),
    "too high": ({"threshold": 1.5}, "threshold is 1.5, not between 0 and 1"),
    "twice": ({"features": ["a"] * 17}, "a feature stands there twice"),
    "true": ({"share": True}, "share is no finite number"),
    "too large": ({"intercept": 10**400}, "intercept is no finite number"),
    "too deep": ("[" * 100_000, "no file of gates"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_of_gates_is_one_line(tmp_path, content, message):
    path = tmp_path / "gates.json"
    if isinstance(content, dict):
        record = dataclasses.asdict(fit_gate(*drawn(1, 64, told=3))) | content
        record = {name: value for name, value in record.items() if value is not ...}
        content = json.dumps({BEFORE: record})
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_gates(path, [BEFORE])
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


GATED = (*SYSTEMS, "expandr-plain", BEFORE, AFTER, f"interpolation:bm25:{BEFORE}")
FILES = (
    "results.json",
    "evaluation/gates.json",
    "evaluation/gated.jsonl",
    "evaluation/choices.jsonl",
)


def synthetic(monkeypatch):
    """Half of the queries find their document at once, and their passages lead astray.

    The others find nothing, and their passages are near their document.
    """
    rng = np.random.default_rng(0)

    def unit():
        x = rng.normal(size=16).astype(np.float32)
        return x / np.linalg.norm(x)

    vectors = {f"text{i}": unit() for i in range(200)}
    queries, qrels = {}, {"dev": {}, "test": {}}
    for i in range(160):
        name, sure = f"query{i}", i % 2
        right, wrong = vectors[f"text{i}"] + 0.3 * unit(), unit()
        vectors[name], vectors[f"of {name}"] = (right, wrong) if sure else (wrong, right)
        queries[f"q{i}"] = name
        qrels["dev" if i < 80 else "test"][f"q{i}"] = {f"d{i}": 1}

    def vector(text):
        name = text.removeprefix("zero-shot ").removeprefix("expandr ")
        return vectors[name] / np.linalg.norm(vectors[name])

    monkeypatch.setattr(choices_test, "CORPUS", {f"d{i}": f"text{i}" for i in range(200)})
    monkeypatch.setattr(choices_test, "QUERIES", queries)
    monkeypatch.setattr(choices_test, "vector", vector)
    monkeypatch.setattr(choices_test, "encode", lambda texts, *_: np.stack([*map(vector, texts)]))
    return qrels


def test_a_collection_of_which_half_is_helped(monkeypatch, tmp_path):
    qrels = synthetic(monkeypatch)
    results, _ = evaluated(monkeypatch, tmp_path, GATED, qrels)
    for entry in results["gates"]:
        assert entry["gated"] > max(entry["always"], entry["never"]) + 0.02, entry
        assert max(entry["p_value_always"], entry["p_value_never"]) < 0.05
        share, rows = entry["share"], {r["system"]: r["ndcg@10"] for r in results["rows"]}
        assert 0.2 < share < 0.8
        assert entry["gated"] == rows[entry["system"]]
        random = share * rows["expandr"] + (1 - share) * rows["expandr-plain"]
        assert entry["random"] == pytest.approx(random, abs=2e-6)
        # What a service answers is what the run did.
    rows = [r for _, r in read_jsonl(tmp_path / "evaluation" / "gated.jsonl", {"system": str})]
    gates = read_gates(tmp_path / "evaluation" / "gates.json", [BEFORE, AFTER])
    runs = {n: metrics.read_trec(tmp_path / "runs" / f"{n}.trec") for n in GATED}
    for row in rows:
        query = row["query_id"]
        part = "expandr" if row["expanded"] else "expandr-plain"
        ours, theirs = runs[row["system"]][query], runs[part][query]
        assert [*ours] == [*theirs]
        if row["system"] == BEFORE:
            search = PlainSearch(runs["expandr-plain"][query], {}, [0], 200)
            assert should_expand(gates[BEFORE], search) == row["expanded"]
    assert len(rows) == 2 * len(qrels["test"])
    pairs = {(r["system"], r["baseline"]) for r in results["significance"]}
    assert {(BEFORE, "expandr-plain"), ("expandr", BEFORE)} <= pairs


@pytest.mark.parametrize("way", ["max", "rrf"])
def test_a_gate_reads_and_passes_on_what_was_found_together(monkeypatch, tmp_path, way):
    """However a query and its texts are searched for, the gated row is one of both rows."""
    qrels, systems = synthetic(monkeypatch), ("expandr", "expandr-plain", AFTER)
    settings = {"expansion.combine": way}
    results, _ = evaluated(monkeypatch, tmp_path, systems, qrels, settings=settings)
    chosen, (entry,) = results["chosen"]["expandr"], results["gates"]
    assert chosen["combine"] == way
    runs = {n: metrics.read_trec(tmp_path / "runs" / f"{n}.trec") for n in systems}
    rows = [r for _, r in read_jsonl(tmp_path / "evaluation" / "gated.jsonl", {"system": str})]
    assert {row["query_id"] for row in rows} == {*qrels["test"]}
    for row in rows:
        query, part = row["query_id"], "expandr" if row["expanded"] else "expandr-plain"
        assert [*runs[AFTER][query]] == [*runs[part][query]]
    means = {row["system"]: row["ndcg@10"] for row in results["rows"]}
    assert (entry["always"], entry["never"]) == (means["expandr"], means["expandr-plain"])
    assert entry["gated"] == means[AFTER]
    if way != "max":
        return
    gate = read_gates(tmp_path / "evaluation" / "gates.json", [AFTER])[AFTER]
    documents = np.stack([choices_test.vector(f"text{i}") for i in range(200)])
    weight, firsts = chosen["query_weight"], []
    for query in qrels["dev"]:
        name = choices_test.QUERIES[query]
        texts = [f"of {name}", "text1"][: chosen["samples"]]
        best = np.max([documents @ choices_test.vector(text) for text in texts], axis=0)
        firsts.append(np.max(weight * documents @ choices_test.vector(name) + (1 - weight) * best))
    mean = gate.means[gate.features.index("expanded_first")]
    assert mean == pytest.approx(np.mean(firsts), abs=1e-5)


def test_test_judgements_change_no_gate(monkeypatch, tmp_path):
    first, _ = evaluated(monkeypatch, tmp_path / "a", GATED, qrels_of(1, 2))
    assert {*first["chosen"][BEFORE]} == {"threshold", "share"}
    other, _ = evaluated(monkeypatch, tmp_path / "b", GATED, qrels_of(1, 3))
    assert other["chosen"] == first["chosen"]
    assert other["rows"] != first["rows"]
    for name in FILES[1:]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    evaluated(monkeypatch, tmp_path / "c", GATED, qrels_of(4, 2))
    gates = [(tmp_path / of / FILES[1]).read_bytes() for of in "ac"]
    assert gates[0] != gates[1]
    # A further collection is gated by the run's own.
    qrels = qrels_of(1, 2) | {"dev": {}}
    further, _ = evaluated(monkeypatch, tmp_path / "a", GATED, qrels, first["chosen"], "tests/toy")
    assert further == first
    assert not (tmp_path / "a" / "tests" / "toy" / FILES[1]).exists()


def test_a_gate_that_comes_to_a_finished_run_does_nothing_again(monkeypatch, tmp_path):
    before = SYSTEMS[:3]
    evaluated(monkeypatch, tmp_path / "a", before, qrels_of(1, 2))
    assert not (tmp_path / "a" / FILES[1]).exists()
    assert "gates" not in json.loads((tmp_path / "a" / "results.json").read_text())
    kept = {p: p.read_bytes() for p in (tmp_path / "a" / "runs").iterdir()}
    order = (*before, *GATED[3:])
    evaluated(monkeypatch, tmp_path / "a", order, qrels_of(1, 2))
    assert {p: p.read_bytes() for p in kept} == kept
    evaluated(monkeypatch, tmp_path / "b", order, qrels_of(1, 2))
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # It stays when more comes after it.
    more = (*order, "rrf:bm25:zero-shot")
    _, searched = evaluated(monkeypatch, tmp_path / "a", more, qrels_of(1, 2))
    assert not searched
    evaluated(monkeypatch, tmp_path / "c", more, qrels_of(1, 2))
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    # One that was damaged is made again.
    (tmp_path / "a" / FILES[1]).write_text("{}")
    evaluated(monkeypatch, tmp_path / "a", more, qrels_of(1, 2))
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_a_gate_needs_dev_queries(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="expandr-gated: there are no dev queries"):
        evaluated(monkeypatch, tmp_path, GATED, qrels_of(1, 2) | {"dev": {}})


def test_gating_beside_always_never_and_at_random():
    expanded = {"a": True, "b": False, "c": False, "d": False}
    always, never = dict.fromkeys("abcd", 0.8), dict.fromkeys("abcd", 0.4)
    gated = {q: (always if expanded[q] else never)[q] for q in "abcd"}
    entry = gate_entry(BEFORE, expanded, gated, always, never)
    assert (entry["share"], entry["gated"], entry["random"]) == (0.25, 0.5, 0.5)
    assert entry["p_value_always"] == metrics.paired_test(gated, always)["p_value"]
