"""What the report shows of on-policy training, from a workdir that no one trained in."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from expandr_jax.objectives.registry import STEP_B
from expandr_jax.report import run_report as report
from tests.report_test import HOSTILE, Page, write_rows

PHASE = "GRPO"
STEPS, LAST = 120, (0, 60, 119)
CAPTIONS = (
    "Reward; the band is the deviation", "Mean of each reward", "Share of groups that teach",
    "KL to the base", "Entropy", "Length of a text", "whose ratio is clipped",
    "Norm of the gradient", "Log-probabilities when training", "Seconds of a step by part",
)  # fmt: skip


def metrics_of(step, random):
    share = step / STEPS
    return {
        "phase": PHASE, "round": 0, "step": step, "loss": 0.0,
        "reward": 0.1 + 0.3 * share + random.normal(0, 0.02), "reward_deviation": 0.1,
        "reward_gain": 0.1 + 0.3 * share, "reward_format": 0.9,
        "teaching": 0.8, "length": 30 + 2 * share, "cut": 0.4, "empty": 0.0, "repetitive": 0.1,
        "kl": 0.02 * share, "entropy": 2 - share, "clip_fraction": 0.01, "mismatch": 1e-6,
        "largest_mismatch": 4e-5, "grad_norm": 0.3 + random.uniform(0, 0.2),
        "step_seconds": 6.25, "sampling_seconds": 3.5, "encoding_seconds": 0.4,
        "search_seconds": 0.02, "rollout_seconds": 4.0, "update_seconds": 2.125,
    }  # fmt: skip


def texts_of(step, ids):
    return [
        {
            "query_id": name, "query": f"What is {name}?", "text": f"{HOSTILE} {name}, {step}.{i}",
            "reward": 0.25 + i, "reward_terms": {"gain": 0.125, "format": 1.0},
        }
        for name in ids
        for i in range(3)
    ]  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    """After `train.policy`."""
    random = np.random.default_rng(0)
    write_rows(tmp_path / "metrics.jsonl", [metrics_of(step, random) for step in range(STEPS)])
    for step in LAST:
        ids = ["b", "a", *(f"{i}" for i in range(12))]
        write_rows(tmp_path / f"round-0/policy-texts-{step}.jsonl", texts_of(step, ids))
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0}))
    return tmp_path


def drawn(workdir):
    text = report.write_on_policy_report(workdir).read_text()
    Page(text)
    return text


def cells(text):
    """The rows of the table of texts: (query, reward, text) of each cell."""
    table = re.search(r'<table class="samples">.*?</table>', text, flags=re.DOTALL).group()
    cell = r"<td><h3>(.*?)</h3><p class=\"rank\">(.*?)</p><blockquote>(.*?)</blockquote></td>"
    rows = re.findall(r"<tr><td>.*?</tr>", table, flags=re.DOTALL)
    return [re.findall(cell, row, flags=re.DOTALL) for row in rows]


def test_each_metric_has_a_plot_and_texts_of_one_query_stand_side_by_side(workdir):
    text = drawn(workdir)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == len(CAPTIONS)
    assert all(part in each for part, each in zip(CAPTIONS, captions, strict=True))
    assert not re.search("NaN|mathdefault", text)
    assert (
        "120 steps; at the median 6.25 s a step: sampling 3.5 s, encoding 0.4 s, search and "
        "rewards 0.02 s, update 2.12 s; all that is not sampling, encoding or update 3.60%." in text
    )
    found = cells(text)
    assert [[query for query, *_ in row] for row in found] == [
        [f"What is {name}?"] * 3 for name in ("b", "a", *range(10))
    ]
    assert "<script" not in text
    for (_, reward, written), step in zip(found[0], LAST, strict=True):
        assert reward == "reward 0.25 (gain 0.125, format 1)"
        assert written.startswith("&lt;script&gt;")
        assert written.endswith(f"b, {step}.0")
    assert drawn(workdir) == text


def test_what_is_damaged_or_gone_is_said_and_the_rest_is_there(workdir):
    first, middle, _ = (workdir / f"round-0/policy-texts-{step}.jsonl" for step in LAST)
    middle.write_text(middle.read_text()[:-20])
    first.unlink()
    text = drawn(workdir)
    assert re.search(r'<p class="absent">[^<]*policy-texts-60\.jsonl:42', text)
    assert [len(row) for row in cells(text)] == [1] * 12  # Of the last step, which is whole.
    middle.unlink()
    (workdir / f"round-0/policy-texts-{LAST[2]}.jsonl").unlink()
    (workdir / "config.json").unlink()
    text = drawn(workdir)
    assert '<table class="samples">' not in text
    assert text.count("<figure>") == len(CAPTIONS)
    lines = [{"phase": PHASE, "round": 0, "step": 0, "reward": 0.5, "kl": math.nan, "entropy": "?"}]
    write_rows(workdir / "metrics.jsonl", lines)
    assert drawn(workdir).count("<figure>") == 1
    (workdir / "metrics.jsonl").unlink()
    assert drawn(workdir).count("This run holds no data") == 3


def test_rounds_follow_one_another(workdir):
    random = np.random.default_rng(1)
    rows = [metrics_of(step, random) | {"round": r} for r in (0, 1) for step in range(10)]
    write_rows(workdir / "metrics.jsonl", rows)
    for step in (0, 5, 9):
        write_rows(workdir / f"round-1/policy-texts-{step}.jsonl", texts_of(step, ["a"]))
    text = drawn(workdir)
    assert "20 steps;" in text
    assert re.findall(r'<th scope="col">(.*?)</th>', text)[:3] == [
        "round 0, step 0", "round 1, step 0", "round 1, step 9",
    ]  # fmt: skip
    assert [len(row) for row in cells(text)] == [1, 3] + [1] * 10
    assert [query for query, *_ in cells(text)[1]] == ["What is a?"] * 3


def test_a_kind_with_a_name_of_its_own_is_drawn_alike(workdir, monkeypatch):
    text = drawn(workdir)
    monkeypatch.setitem(STEP_B, "mine", dataclasses.replace(STEP_B["grpo"], phase="MINE"))
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text().replace(PHASE, "MINE"))
    assert drawn(workdir) == text


def test_the_report_of_a_whole_run_has_it_in_place_of_candidates(workdir):
    row = {"system": "bm25", "ndcg@10": 0.25, "mrr@10": 0.5, "recall@100": 1.0, "map": 0.0}
    results = {"dataset": "set", "queries": 1, "chosen": {}, "rows": [row], "significance": []}
    (workdir / "results.json").write_text(json.dumps(results))
    text = report.write_report(workdir).read_text()
    sections = re.findall(r'<section id="(.*?)">', text)
    assert "on-policy-training" in sections
    assert "rewards-of-the-candidates" not in sections
    training = re.search(r'<section id="training">.*?</section>', text, flags=re.DOTALL).group()
    assert "Contrastive loss" not in training  # The losses of GRPO are none of the retriever's.
