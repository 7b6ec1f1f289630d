"""What fresh samples are worth, one by one, and the table of several runs that tests them."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from configs import base
from eval import seeds
from expandr_jax import metrics
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.ranking.samples import RANK, REWARD, mean_by_query
from expandr_jax.rewards.samples import sample_rows
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.query import EncodedQueries

IDS = [f"d{i}" for i in range(40)]
QRELS = {"dev": {"a": {"d3": 1}}, "test": {"b": {"d7": 1, "d9": 2, "gone": 1}, "c": {"d1": 0}}}


def unit(*shape):
    x = np.random.default_rng(len(shape)).normal(size=(*shape, 6)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_samples_are_ranked_alone_and_rewarded_with_their_query():
    config = base.get_config()
    config.reward.update(corpus=1.0, corpus_measure="softmax_share", query_weight=0.7, depth=30)
    config.reward.corpus_temperature = 0.1
    config.evaluation.sample_depth = 20
    vectors = unit(40)
    config.search.backend = "exact"
    config = read_config(config)
    corpus = Corpus(IDS, vectors, config.search)
    texts = {document: f"text {document}" for document in IDS}
    queries = {query: f"text {query}" for split in QRELS.values() for query in split}
    data = TrainingData(Collection("c", texts, queries, {"train": {}, **QRELS}), [], [])
    encoded = {
        split: EncodedQueries(
            list(judged),
            unit(len(judged))[:, :6],
            unit(len(judged), 3),
            np.ones((len(judged), 3), bool),
        )
        for split, judged in QRELS.items()
    }
    encoded["test"].present[0, 1] = False
    how = config.reward, config.evaluation
    rows = sample_rows("expandr", corpus, data, encoded, *how)
    assert [(r["query_id"], r["sample"]) for r in rows] == [(q, i) for q in "abc" for i in range(3)]
    for row in rows:
        part, sample = encoded[row["split"]], row["sample"]
        place = part.ids.index(row["query_id"])
        query, passage = part.queries[place], part.expansions[place, sample]
        right = [d for d, grade in QRELS[row["split"]][row["query_id"]].items() if grade > 0]
        present = part.present[place, sample]
        scores = dict(zip(IDS, vectors @ passage, strict=True))
        order = sorted(IDS, key=scores.get, reverse=True)[:20]
        ranks = [order.index(d) + 1 for d in right if d in order]
        assert row[RANK] == (1 / min(ranks) if ranks and present else 0.0), row
        both = 0.7 * query + 0.3 * passage if present else query
        scores = dict(zip(IDS, vectors @ (both / np.linalg.norm(both)), strict=True))
        found = sorted(scores.values(), reverse=True)[:30]
        share = sum(np.exp(scores[d] / 0.1) for d in right if scores.get(d, -9.0) >= found[-1])
        assert row[REWARD] == pytest.approx(share / np.exp(np.array(found) / 0.1).sum(), rel=1e-4)
    means = mean_by_query(rows, "expandr", "test", RANK)
    assert means == {"b": pytest.approx(np.mean([r[RANK] for r in rows[3:6]])), "c": 0.0}
    how = dataclasses.replace(config.reward, corpus=0.0), config.evaluation
    rows = sample_rows("expandr", corpus, data, encoded, *how)
    assert REWARD not in rows[0]
    assert mean_by_query(rows, "expandr", "test", REWARD) == {}


@pytest.fixture
def workdirs(tmp_path):
    """Two runs of two systems on twelve queries, each with one relevant document."""
    random = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(12)}
    for run in ("one", "two"):
        root = tmp_path / run
        for name in ("runs", "evaluation"):
            (root / name).mkdir(parents=True)
        metrics.write_qrels(root / "qrels.trec", qrels)
        samples, rows = [], []
        for system, shift in (("expandr", 0.3), ("expandr-base-generator", 0.0)):
            scores = {
                query: {f"d{i}": float(random.normal() + shift * (f"q{i}" == query) * 5)
                        for i in range(12)}
                for query in qrels
            }  # fmt: skip
            metrics.write_trec(root / "runs" / f"{system}.trec", scores, system)
            means = {m: round(metrics.mean(of), 6)
                     for m, of in metrics.evaluate(scores, qrels).items()}  # fmt: skip
            rows.append({"system": system, **means})
            samples += [
                {"query_id": query, "split": "test", "system": system, "sample": i,
                 RANK: float(random.random()), REWARD: float(random.random())}
                for query in qrels for i in range(2)
            ]  # fmt: skip
        write_jsonl(root / "evaluation" / "samples.jsonl", samples)
        results = {"dataset": "toy", "chosen": {}, "rows": rows}
        (root / "results.json").write_text(json.dumps(results))
        config = {"seed": ["one", "two"].index(run), "generator": {"slots": 8}, "rounds": 1}
        (root / "config.json").write_text(json.dumps({"config": config, "versions": {}}))
    return [tmp_path / "one", tmp_path / "two"]


def test_seeds_are_averaged_before_queries_are_compared(workdirs):
    text = seeds.table(workdirs, "expandr")
    values = {
        system: np.array([
            [1 / np.log2(1 + rank) if (rank := _rank(root, system, f"q{i}")) <= 10 else 0.0
             for i in range(12)]
            for root in workdirs
        ])
        for system in ("expandr", "expandr-base-generator")
    }  # fmt: skip
    ours, base_ = values["expandr"], values["expandr-base-generator"]
    (row,) = (line for line in text.splitlines() if line.startswith("| expandr-base"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    spread = base_.mean(1).std(ddof=1)
    assert cells[1] == f"{base_.mean():.4f} ({spread:.4f})"
    assert cells[-4] == f"{(ours - base_).mean():+.4f}"
    differences = ((ours - base_).mean(0),)
    bounds = stats.bootstrap(differences, np.mean, method="percentile", rng=0).confidence_interval
    found = [float(bound) for bound in cells[-3].split(" to ")]
    np.testing.assert_allclose(found, bounds, atol=0.02)
    assert cells[-2] == f"{stats.ttest_rel(ours.mean(0), base_.mean(0)).pvalue:.2g}"
    assert cells[-1] == f"{stats.ttest_rel(ours.mean(1), base_.mean(1)).pvalue:.2g}"
    for field, start in seeds.SAMPLES.items():
        means = []
        for system in values:
            rows = [
                json.loads(line)
                for root in workdirs
                for line in (root / "evaluation/samples.jsonl").read_text().splitlines()
            ]
            means.append(np.mean([r[field] for r in rows if r["system"] == system]))
        assert f"{start}: {means[0]:.4f} trained generator, {means[1]:.4f} untrained" in text


def _rank(root, system, query):
    for line in (root / "runs" / f"{system}.trec").read_text().splitlines():
        found, _, document, rank, *_ = line.split()
        if found == query and document == f"d{query[1:]}":
            return int(rank)
    raise AssertionError(query)


def test_runs_that_cannot_be_compared_are_refused(workdirs, tmp_path):
    with pytest.raises(UserError, match="named twice"):
        seeds.main(["seeds", str(workdirs[0]), f"{workdirs[0]}/."])
    with pytest.raises(UserError, match="no runs given"):
        seeds.main(["seeds"])
    with pytest.raises(UserError, match="not a finished run"):
        seeds.table([tmp_path], "expandr")
    with pytest.raises(UserError, match="no system 'other'"):
        seeds.table(workdirs, "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 0}, "two: has the seed of .*one; it would count twice"),
        ({"rounds": 2}, "two: rounds is 2, in .*one 1; expected runs that differ by their seed"),
        ({"generator": {"slots": 16}}, None),
    ],
)
def test_runs_differ_by_their_seed_alone(workdirs, changes, message):
    path = workdirs[1] / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": record["config"] | changes}))
    if message is None:
        assert "2 runs" in seeds.table(workdirs, "expandr")
    else:
        with pytest.raises(UserError, match=message):
            seeds.table(workdirs, "expandr")
    for text in ("{}", "[]", '{"config": []}', '{"config": {"reward": 3}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"two/config\.json: not a run's config"):
            seeds.table(workdirs, "expandr")


def test_samples_that_lack_a_query_are_named(workdirs):
    path = workdirs[1] / "evaluation" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"q7"' not in line))
    with pytest.raises(UserError, match=r"samples\.jsonl: nothing of expandr for query q7"):
        seeds.table(workdirs, "expandr")


DEEP = "[" * 100_000


def cut(path):
    """Leaves half of the lines, as a copy that was broken off may."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("runs/expandr.trec", cut, "two: expandr has ndcg@10 .* in results and .* by its values"),
        ("qrels.trec", cut, "two: expandr has ndcg@10 .* in results and .* by its values"),
        ("runs/expandr.trec", pathlib.Path.unlink, r"two/runs/expandr\.trec: is not there"),
        ("results.json", lambda path: path.write_text("{}"), r"two/results\.json: it has no rows"),
        ("results.json", lambda path: path.write_text(DEEP), r"two/results\.json: cannot be"),
        ("config.json", lambda path: path.write_text(DEEP), r"two/config\.json: not a run's"),
        ("evaluation/samples.jsonl", lambda path: path.write_text(""), "nothing of expandr in"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_no_seed(workdirs, name, spoil, message):
    spoil(workdirs[1] / name)
    with pytest.raises(UserError, match=message) as raised:
        seeds.table(workdirs, "expandr")
    assert "\n" not in str(raised.value)


def test_files_of_a_run_are_what_it_has_recorded(workdirs):
    Checksums(workdirs[1], print).record("results.json", "qrels.trec", "runs", "evaluation")
    (workdirs[1] / "runs" / "mine.trec").write_text("of somebody else\n")
    text = seeds.table(workdirs, "expandr")
    samples = workdirs[1] / "evaluation" / "samples.jsonl"
    line = samples.read_text().splitlines(keepends=True)[0]
    samples.write_text(samples.read_text().replace(line, "", 1))
    with pytest.raises(UserError, match=r"two/evaluation/samples\.jsonl: is damaged or was rem"):
        seeds.table(workdirs, "expandr")
    assert "2 runs" in text
