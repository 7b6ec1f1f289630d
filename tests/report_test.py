"""The report of a run that looks like a real one, whole and with parts missing."""

import html.parser
import io
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import rich.console

from expandr_jax import metrics
from expandr_jax.data.beir import read_qrels
from expandr_jax.errors import UserError
from expandr_jax.report import run_report as report

SYSTEMS = {  # Typical log2 of the relevant document's rank.
    "bm25": 3.1,
    "zero-shot": 2.6,
    "zero-shot+expansion": 2.5,
    "fine-tuned": 2.0,
    "fine-tuned+expansion": 2.0,
    "expandr": 1.5,
    "expandr-base-generator": 1.75,
    "expandr-plain": 1.8,
}
QUERIES = 60
HOSTILE = "<script>alert('x')</script> & \"quotes\""


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run in the files of the contract, from made-up models."""
    root = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    queries = [f"q{i:03}" for i in range(QUERIES)]
    texts = {q: f"Return the {i}-th discrete difference along the given axis." for i, q in
             enumerate(queries)}  # fmt: skip
    texts[queries[0]] = HOSTILE
    qrels = {query: {f"doc-{query}": 1} for query in queries}
    metrics.write_qrels(root / "qrels.trec", qrels)
    write_rows(
        root / "data/corpus.jsonl",
        [
            {"_id": f"doc-{q}", "title": f"np.diff{i}", "text": f"{HOSTILE} " + "Parameters " * 60}
            for i, q in enumerate(queries)
        ],
    )
    rows, values, hardness = [], {}, random.normal(0, 1.5, QUERIES)
    for system, centre in SYSTEMS.items():
        run = {}
        for query, hard in zip(queries, hardness, strict=True):
            rank = max(1, round(2 ** random.normal(centre + hard, 0.7)))
            names = [f"other-{i}" for i in range(100)]
            if rank <= 100:
                names[rank - 1] = f"doc-{query}"
            run[query] = {name: 1 - i / 200 for i, name in enumerate(names)}
        metrics.write_trec(root / f"runs/{system}.trec", run, system)
        values[system] = metrics.evaluate(run, qrels)
        rows.append(
            {"system": system} | {name: metrics.mean(v) for name, v in values[system].items()}
        )
    significance = [
        {"system": "expandr", "baseline": other, "metric": "ndcg@10"}
        | metrics.paired_test(values["expandr"]["ndcg@10"], values[other]["ndcg@10"])
        for other in SYSTEMS
        if other != "expandr"
    ]
    results = {
        "dataset": "pydoc",
        "queries": QUERIES,
        "chosen": {"query_weight": 0.8, "samples": 2},
        "rows": rows,
        "significance": significance,
    }
    (root / "results.json").write_text(json.dumps(results))
    (root / "config.json").write_text(json.dumps({"seed": 0, "note": HOSTILE}))
    log = []
    for phase, steps in (("retriever", 240), ("fine-tuned", 240), ("generator", 120)):
        for step in range(steps):
            decay = math.exp(-step / 60)
            row = {"phase": phase, "round": 0, "step": step}
            if phase == "generator":
                row["loss"] = 0.45 + 0.24 * decay + random.normal(0, 0.03)
                row["accuracy"] = float(np.clip(0.8 - 0.3 * decay + random.normal(0, 0.05), 0, 1))
                row["margin"] = 1.4 * (1 - decay) + random.normal(0, 0.08)
            else:
                row["loss"] = 0.3 + 1.5 * decay + random.normal(0, 0.08)
            log.append(row)
        if phase != "generator":
            log += [
                {"phase": phase, "round": 0, "step": step, "dev_ndcg@10": 0.5 + 0.1 * step / 240}
                for step in (0, 80, 160, 240)
            ]
    write_rows(root / "metrics.jsonl", log)
    candidates, preferences = [], []
    for i in range(80):
        ranks = [random.permutation(32) + 1 for _ in range(2)]
        rewards = 1 / ranks[0] + 1 / ranks[1]
        group = [
            {"text": "A passage.", "temperature": 0.8 + 0.1 * (n // 8), "reward": float(reward)}
            for n, reward in enumerate(rewards)
        ]
        candidates.append({"query_id": f"t{i}", "query": "q", "candidates": group})
        preferences.append(
            {"reward_chosen": float(rewards.max()), "reward_rejected": float(rewards.min())}
        )
    write_rows(root / "round-0/candidates.jsonl", candidates)
    write_rows(root / "round-0/preferences.jsonl", preferences)
    passage = "The numpy.diff function computes differences of consecutive elements.\n\n" * 3
    write_rows(
        root / "evaluation/expansions.jsonl",
        [
            {"query_id": query, "split": "test", "system": system, "sample": sample,
             "query": texts[query], "expansion": f"{HOSTILE} {system} {sample} {passage}"}
            for query in queries
            for system in ("expandr", "expandr-base-generator")
            for sample in range(2)
        ],
    )  # fmt: skip
    write_rows(
        root / "evaluation/samples.jsonl",
        [
            {"query_id": query, "split": "test", "system": system, "sample": sample,
             "reciprocal_rank": float(random.beta(a, 2)), "corpus_reward": a / 4}
            for query in queries
            for system, a in (("expandr-base-generator", 1.0), ("expandr", 1.6))
            for sample in range(4)
        ],
    )  # fmt: skip
    phases = {"harvest": 21, "expand": 190, "train retriever": 140, "encode": 35, "sample": 312,
              "reward": 12, "train generator": 170, "evaluate": 95}  # fmt: skip
    timings = {
        "phases": [
            {
                "phase": name,
                "seconds": seconds,
                "peak_memory_bytes": 2**30 + seconds * 10**6,
                **({} if name == "harvest" else {"device": "TPU v5e", "jax": "0.10.2"}),
            }
            for name, seconds in phases.items()
        ],
        "total_seconds": 990.0,
        "peak_memory_bytes": 3 * 2**30,
    }
    (root / "timings.json").write_text(json.dumps(timings))
    return root


class Page(html.parser.HTMLParser):
    """Collects what a page holds and refuses a tag that does not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page_text(workdir):
    path = report.write_report(workdir)
    assert path == workdir / "report.html"
    return path.read_text()


def test_the_page_stands_alone_and_escapes_all_text(page_text):
    page = Page(page_text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "http" not in page_text
    assert "@import" not in page_text
    assert not re.search(r"url\((?!#)", page_text)
    assert HOSTILE in "".join(page.text)  # shown as written
    sections = [text for text in page.ids if not re.fullmatch("[mp][0-9a-f]{10}", text)]
    assert len(sections) == len(set(sections)) == page.tags.count("h2") == 8
    assert "This run holds no data" not in page_text
    assert page.tags.count("caption") == page.tags.count("table") >= 4


def test_the_page_repeats_byte_for_byte(workdir, page_text):
    assert report.write_report(workdir).read_text() == page_text


def test_metrics_and_intervals_are_those_of_the_files(workdir, page_text):
    results = json.loads((workdir / "results.json").read_text())
    text = " ".join(Page(page_text).text)
    for row in results["rows"]:
        assert row["system"] in text
        assert f"{row['ndcg@10']:.4f}" in text
        run = metrics.read_trec(workdir / f"runs/{row['system']}.trec")
        values = metrics.evaluate(run, read_qrels(workdir / "qrels.trec"))["ndcg@10"]
        low, high = metrics.bootstrap_interval(list(values.values()))
        assert f"{low:.3f} – {high:.3f}" in text
    assert "16 min 30 s" in text
    assert "3.00 GiB" in text
    assert "By phase, on TPU v5e with jax 0.10.2." in text
    assert "query_weight" in text


def _relevant_rank(run, query):
    ranking = sorted(run[query], key=run[query].get, reverse=True)
    return ranking.index(f"doc-{query}") + 1 if f"doc-{query}" in ranking else None


def test_expansions_show_gains_losses_and_others_with_their_ranks(workdir, page_text):
    before = metrics.read_trec(workdir / "runs/expandr-plain.trec")
    after = metrics.read_trec(workdir / "runs/expandr.trec")
    change = {
        q: sum(
            sign / rank
            for sign, run in ((1, after), (-1, before))
            if (rank := _relevant_rank(run, q))
        )
        for q in before
    }
    cards = re.findall(r"<article>.*?</article>", page_text, flags=re.DOTALL)
    assert len(cards) == 12
    shown = []
    for card in cards:
        assert "expandr 0 The numpy" in card  # sample 0 of the trained generator
        heading = re.search(r"<h3>(.*?)</h3>", card).group(1)
        number = re.search(r"Return the (\d+)-th", heading)
        query = f"q{int(number.group(1)):03}" if number else "q000"
        shown.append(query)
        ranks = [_relevant_rank(run, query) or "beyond 100" for run in (before, after)]
        assert f"rank {ranks[0]} → {ranks[1]} " in card
    ordered = sorted(change.values())
    np.testing.assert_allclose([change[q] for q in shown[:4]], ordered[::-1][:4])
    np.testing.assert_allclose([change[q] for q in shown[4:8]], ordered[:4])
    assert len(set(shown)) == 12


def test_rewards_of_fresh_samples_are_shown_before_and_after(workdir):
    text = report.write_report(workdir).read_text()
    assert "Mean reward in the corpus (reward.corpus_measure) of fresh samples" in text
    assert "0.2500 with the base generator, 0.4000 with the trained one (+0.1500" in text


@pytest.mark.parametrize(
    ("absent", "section"),
    [
        (["metrics.jsonl"], "training"),
        (["round-0/candidates.jsonl", "round-0/preferences.jsonl"], "rewards-of-the-candidates"),
        (["evaluation/samples.jsonl"], "fresh-samples-before-and-after-step-b"),
        (["evaluation/expansions.jsonl"], "expansions"),
        (["runs/expandr-plain.trec"], "expansions"),
        (["timings.json"], "where-the-time-went"),
    ],
)
def test_a_section_without_data_says_so(workdir, absent, section):
    hidden = [(workdir / name, workdir / f"{name}.hidden") for name in absent]
    for path, aside in hidden:
        path.rename(aside)
    try:
        text = report.write_report(workdir).read_text()
    finally:
        for path, aside in hidden:
            aside.rename(path)
    Page(text)
    content = re.search(f'<section id="{section}">.*?</section>', text, flags=re.DOTALL).group()
    assert "This run holds no data" in content
    assert text.count("This run holds no data") == 1


def test_results_alone_make_a_page(tmp_path):
    with pytest.raises(UserError, match="not been evaluated"):
        report.write_report(tmp_path)
    row = {"system": "bm25", "ndcg@10": 0.25, "mrr@10": 0.5, "recall@100": 1.0, "map": 0.0}
    results = {
        "dataset": "a $set$ <b>",
        "queries": 1,
        "chosen": {},
        "rows": [row],
        "significance": [],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report.write_report(tmp_path).read_text()
    assert "a $set$ &lt;b&gt;" in text
    assert "0.2500" in text
    Page(text)
    (tmp_path / "metrics.jsonl").write_text(
        '{"phase": "retriever", "step": 0, "loss": 1.5}\n{"step"'
    )
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        report.write_report(tmp_path)


def test_of_candidates_and_pairs_rewards_alone_are_held(tmp_path):
    """However long their texts are; the figures are those of the files."""
    (tmp_path / "results.json").write_text(
        json.dumps({"dataset": "set", "queries": 1, "chosen": {}, "rows": [], "significance": []})
    )
    pair = {"prompt": "p" * 100_000, "chosen": "c" * 100_000, "rejected": "r" * 100_000}
    rewards = {"reward_chosen": 2, "reward_rejected": 0.25}
    write_rows(tmp_path / "round-0/preferences.jsonl", [{**pair, **rewards}] * 60)
    candidates = [{"text": "", "temperature": 0.8 + 0.2 * (i % 2), "reward": i} for i in range(4)]
    write_rows(tmp_path / "round-0/candidates.jsonl", [{"candidates": candidates}] * 3)
    report.write_report(tmp_path)  # Matplotlib is there from now on.
    tracemalloc.start()
    page = report.write_report(tmp_path).read_text()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000_000
    text = " ".join(Page(page).text)
    assert "Reward of all candidates, chosen, rejected, round 0" in text
    assert re.search(r"0\s+0\.8\s+6\s+1\.0000\s+0\s+1\s+6\s+2\.0000", text)


def test_losses_of_different_kinds_are_drawn_apart(tmp_path):
    row = {"system": "bm25", "ndcg@10": 0.25, "mrr@10": 0.5, "recall@100": 1.0, "map": 0.0}
    results = {"dataset": "a", "queries": 1, "chosen": {}, "rows": [row], "significance": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    phases = ("fine-tuned", "expandr-figret", "llara", "distill", "distill-control", "warm-start",
              "generator")  # fmt: skip
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"phase": phase, "step": n, "loss": 1.5} for phase in phases for n in (0, 1)],
    )
    text = report.write_report(tmp_path).read_text()
    assert {*re.findall(r"loss by step: ([a-z, -]+)", text)} == {
        "fine-tuned, expandr-figret", "llara", "distill, distill-control", "warm-start",
        "generator",
    }  # fmt: skip
    for caption in ("LLaRA", "warm start", "in step B"):
        assert caption in text


def test_the_terminal_table_holds_every_row(workdir):
    results = json.loads((workdir / "results.json").read_text())
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(report.results_table(results))
    text = console.export_text()
    for row in results["rows"]:
        assert re.search(rf"{re.escape(row['system'])} .*{row['ndcg@10']:.4f}", text)
