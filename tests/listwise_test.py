"""`listwise:SYSTEM`: repaired answers, windows against a twin, prompts that fit, whole rows."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest
from rich.console import Console

from configs import base, smoke
from eval.beir import evaluate_beir
from expandr_jax import metrics
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.errors import UserError
from expandr_jax.expansion import cache
from expandr_jax.ranking.listwise import (
    FAULTS,
    ListPrompts,
    ListRanker,
    ask_for_order,
    order_of,
    windows,
    written,
)
from expandr_jax.ranking.systems import parse_system
from expandr_jax.weights.hf import load_generator
from tests.commands import command, error_of, finish, start

SETTINGS = read_config(base.get_config()).evaluation.listwise
WORDS = ["array", "sort", "pad", "matrix", "inverse", "scale", "gradient", "list", "zero", "shape"]


@pytest.mark.parametrize(
    ("answer", "order", "wrong"),
    [
        ("[2] > [3] > [1] > [4]", [1, 2, 0, 3], ()),
        ("The order is: [4] > [3] > [2] > [1].", [3, 2, 1, 0], ()),
        ("4, 2, 1, 3", [3, 1, 0, 2], ()),
        ("[4, 2, 1, 3]", [3, 1, 0, 2], ()),
        ("Of the 4 passages [3] > [1] > [2] > [4]", [2, 0, 1, 3], ()),
        ("[ 02 ] > [1]>[3]\n> [004]", [1, 0, 2, 3], ()),
        ("[3] > [4]", [2, 3, 0, 1], ("missing",)),
        ("[3] > [3] > [1] > [2] > [4] > [1]", [2, 0, 1, 3], ("repeated",)),
        ("[3] > [9] > [1] > [0] > [2] > [4]", [2, 0, 1, 3], ("unknown",)),
        ("[4] > [4] > [7]", [3, 0, 1, 2], ("missing", "repeated", "unknown")),
        (f"[{'9' * 5000}] > [2] > [1] > [3] > [4]", [1, 0, 2, 3], ("unknown",)),
        ("[2] > [3] > [1] > [4", [1, 2, 0, 3], ("missing",)),
        ("", [0, 1, 2, 3], ("none",)),
        ("None of the passages is relevant.", [0, 1, 2, 3], ("none",)),
        ("[17] > [0]", [0, 1, 2, 3], ("none",)),
        ("[a] > [b]", [0, 1, 2, 3], ("none",)),
    ],
)
def test_an_answer_is_repaired_and_what_was_wrong_is_told(answer, order, wrong):
    assert order_of(answer, 4) == (order, frozenset(wrong))


def test_any_answer_gives_a_permutation_and_a_whole_one_itself():
    draw = random.Random(0)
    parts = ["[", "]", ">", " ", "\n", "[]", "[[", "²", "٣", "-1", "é", "x"]
    for _ in range(3000):
        count = draw.randint(1, 25)
        numbers = [str(draw.randint(0, 30)) for _ in range(draw.randint(0, 30))]
        mixed = [draw.choice(parts) if draw.random() < 0.5 else n for n in numbers]
        answer = draw.choice(["", " ", " > "]).join(mixed)
        order, wrong = order_of(answer, count)
        assert sorted(order) == list(range(count))
        assert wrong <= {*FAULTS}
        assert wrong == {"none"} or "none" not in wrong
        whole = draw.sample(range(count), count)
        assert order_of(f"Sure: {written(whole)}", count) == (whole, frozenset())
        assert order_of(written(order), count) == (order, frozenset())  # Repaired, it is whole.
        kept = draw.sample(whole, draw.randint(1, count))
        order, wrong = order_of(written(kept), count)
        assert order == kept + [place for place in range(count) if place not in kept]
        assert wrong == ({"missing"} if len(kept) < count else set())


def slid(worth, window, stride):
    """A list of worths as windows that sort what they see leave it: a twin in numpy."""
    worth, start = np.array(worth), max(0, len(worth) - window)
    while True:
        seen = worth[start : start + window]
        worth[start : start + window] = np.sort(seen)[::-1]
        if start == 0:
            return worth.tolist()
        start = max(0, start - stride)


def oracle(messages):
    """Answers of a generator that never errs, whose passages say what they are worth."""
    made = {}
    for query, message in messages.items():
        found = re.findall(r"^\[(\d+)\] worth (\d+)$", message, re.MULTILINE)
        order = sorted(found, key=lambda pair: -int(pair[1]))
        made[query] = written([int(number) - 1 for number, _ in order])
    return made


def ranker_of(answers, **settings):
    return ListRanker(dataclasses.replace(SETTINGS, **settings), ask_for_order, answers)


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (4, 1), (4, 3), (10, 5), (20, 10)])
def test_windows_sort_the_top_as_a_twin_does(window, stride):
    draw = random.Random(window)
    lengths = sorted({0, 1, 2, window - 1, window, window + 1, 3 * window, 3 * window + 1, 37})
    worth = {f"q{n}": draw.sample(range(1000), n) for n in lengths}
    corpus = {f"{q}d{i}": f"worth {w}" for q, all_ in worth.items() for i, w in enumerate(all_)}
    of = {document: int(text.split()[1]) for document, text in corpus.items()}
    run = {q: {f"{q}d{i}": 50.0 - i for i in range(len(found))} for q, found in worth.items()}
    asked = []

    def answers(messages):
        asked.append(set(messages))
        return oracle(messages)

    for depth in (3 * window, 1, 1000):
        asked.clear()
        ranker = ranker_of(answers, window=window, stride=stride)
        again, counted = ranker.rank(run, dict.fromkeys(run, "query"), corpus, depth)
        for query, found in worth.items():
            first, rest = found[:depth], found[depth:]
            order = sorted(again[query], key=again[query].get, reverse=True)
            expected = slid(first, window, stride) if first else []
            assert [of[document] for document in order] == expected + rest
            top = window - stride
            assert expected[:top] == sorted(first, reverse=True)[:top]
            assert [again[query][d] for d in order] == [*range(len(found), 0, -1)]
        # Each window of all queries is asked for at once, and of each query as many as it takes.
        each = [len(windows(min(depth, n), window, stride)) for n in lengths]
        calls = sum(map(len, asked))
        assert (len(asked), calls) == (max(each), sum(each))
        assert counted == {"answers": calls, **dict.fromkeys(FAULTS, 0)}


def test_a_window_is_never_without_what_moved_up():
    assert windows(20, 10, 5) == [(10, 20), (5, 15), (0, 10)]
    assert windows(12, 10, 5) == [(2, 12), (0, 10)]
    assert windows(7, 10, 5) == [(0, 7)]
    assert windows(1, 10, 5) == windows(0, 10, 5) == []


def test_malformed_answers_are_counted_by_kind():
    run = {f"q{i}": {f"d{n}": 9.0 - n for n in range(4)} for i in range(3)}
    corpus = {f"d{n}": str(n) for n in range(4)}
    answers = {"q0": "no", "q1": "[2] > [2] > [8]", "q2": "[4] > [3] > [2] > [1]"}
    ranker = ranker_of(lambda _: answers, window=4, stride=2)
    again, counted = ranker.rank(run, dict.fromkeys(run, ""), corpus, 4)
    assert counted == {"answers": 3, "none": 1, "missing": 1, "repeated": 1, "unknown": 1}
    assert [*again["q0"]] == ["d0", "d1", "d2", "d3"]
    assert [*again["q1"]] == ["d1", "d0", "d2", "d3"]
    assert [*again["q2"]] == ["d3", "d2", "d1", "d0"]


@pytest.fixture(scope="module")
def generator():
    return load_generator(str(smoke.MODELS / "tiny-llama"))[0]


@pytest.mark.parametrize("buckets", [(64, 180), (1000,)])
def test_no_prompt_is_longer_than_the_model_reads(generator, buckets):
    """The tiny model reads 256 tokens: the shorter of both limits holds."""
    settings = dataclasses.replace(SETTINGS, window=3, stride=1, passage_tokens=40)
    prompts = ListPrompts(generator, settings, buckets)
    (answer,) = generator.token_ids([written([2, 0, 1])])
    assert prompts.answer_tokens > len(answer)
    assert prompts.longest == min(max(buckets), 256 - prompts.answer_tokens)
    draw, cut = random.Random(1), 0
    for _ in range(60):
        texts = [
            " ".join(draw.choice([*WORDS, "日本語", "\n\n", "x" * 90]) for _ in range(n))
            for n in (draw.choice([0, 1, 5, 400]) for _ in range(4))
        ]
        message = prompts.message(texts[0], texts[1:])
        ids, was_cut = generator.chat_ids(message, prompts.longest)
        assert not was_cut
        shown = re.findall(r"^\[\d\] ?(.*)$", message, re.MULTILINE)
        for text, line in zip(texts[1:], shown, strict=True):
            whole = " ".join(text.split())
            assert whole.startswith(line)
            (tokens,) = generator.token_ids([line])
            assert len(tokens) <= settings.passage_tokens + 2  # Cut within a word, of more tokens.
            cut += line != whole
        tokens = [len(generator.token_ids([line])[0]) for line in shown]
        lines = zip(tokens, shown, texts[1:], strict=True)
        if any(n < 38 and line != " ".join(text.split()) for n, line, text in lines):
            assert len(ids) > prompts.longest - 15  # None is shorter than it has to be.
    assert cut > 20


def test_windows_that_do_not_fit_are_refused(generator):
    with pytest.raises(UserError, match=r"window is 10: so many .* for prompts of 96; lower"):
        ListPrompts(generator, SETTINGS, (96,))
    systems = ["bm25", "listwise:bm25"]
    config = smoke.get_config()
    config.evaluation.listwise.update(window=5, stride=5)
    config.evaluation.update(query_weights=(0.5,), samples=(1,))
    with pytest.raises(UserError, match=r"listwise\.stride is 5; expected less than .*window, 5,"):
        evaluate_beir(config, "none", [], systems, "test", Console(quiet=True))
    with pytest.raises(UserError, match="expected a system to rank again, listwise:dense"):
        parse_system("rrf:dense:listwise")
    system = parse_system("interpolation:bm25:listwise:dense")
    assert (system.generators, system.needs_training) == ({"base"}, False)
    assert not parse_system("rerank:dense").generators


def write_set(directory, draw):
    texts = [" ".join(draw.choice(WORDS) for _ in range(6)) for _ in range(12)]
    corpus = {f"d{i}": f"{chr(97 + i) * 2} {text}" for i, text in enumerate(texts)}
    queries = {f"{split}{i}": " ".join(draw.sample(WORDS, 3)) for split in "qv" for i in range(4)}
    judged = {query: {draw.choice([*corpus]): 1} for query in queries}
    parts = {"test": "q", "dev": "v"}
    qrels = {s: {q: judged[q] for q in queries if q[0] == letter} for s, letter in parts.items()}
    write_beir(directory, Collection(directory.name, corpus, queries, qrels))
    return corpus, queries, judged


def small():
    config = smoke.get_config()
    config.generator.prompt_buckets = (224,)
    config.evaluation.update(query_weights=(0.5,), samples=(1,))
    config.evaluation.listwise.update(window=3, stride=1, depth=5, passage_tokens=16)
    return config


@pytest.mark.slow
def test_rows_are_ranked_by_what_the_generator_answers(tmp_path, monkeypatch):
    write_set(tmp_path / "set", random.Random(0))
    config, names = small(), ["dense", "listwise:dense"]
    config.evaluation.listwise.depths = (2, 5)

    def evaluate(workdir):
        data, console = [str(tmp_path / "set")], Console(record=True, width=200)
        found = evaluate_beir(config, workdir, data, names, "test", console)["set"]
        return found, console.export_text()

    found, said = evaluate(tmp_path / "out")
    assert [row["system"] for row in found["rows"]] == names
    (counted,) = found["listwise"]
    assert counted["system"] == "listwise:dense"
    depth = found["chosen"]["listwise:dense"]["depth"]
    assert counted["answers"] == 4 * len(windows(depth, 3, 1))
    (remark,) = found["remarks"]
    assert remark.startswith(f"listwise:dense: of {counted['answers']} orders that were written ")
    assert f"{counted['none']} named no passage" in remark
    for text in (said, (tmp_path / "out/results.md").read_text()):
        assert remark in text
    before, after = (metrics.read_trec(tmp_path / f"out/runs/{n}.trec") for n in names)
    for query, scores in before.items():
        assert [*after[query]][depth:] == [*scores][depth:]
        assert {*[*after[query]][:depth]} == {*[*scores][:depth]}
    timings = json.loads((tmp_path / "out/timings.json").read_text())
    assert "set: listwise:dense" in {phase["phase"] for phase in timings["phases"]}
    # Where it goes on, nothing is asked again, and counts are there as runs are.
    monkeypatch.setattr(cache, "sample_texts", None)
    for lost in (["results.json"], ["results.json", "runs/listwise:dense.trec"]):
        for name in lost:
            (tmp_path / "out" / name).unlink()
        assert evaluate(tmp_path / "out")[0] == found


def test_a_generator_that_never_errs_puts_what_is_relevant_first(tmp_path, monkeypatch):
    corpus, queries, judged = write_set(tmp_path / "set", random.Random(0))
    seen = []

    def kept(directory, sampler, name, requests, timed):
        seen.extend(requests)
        made = {}
        for request in requests:
            lines = re.findall(r"^\[\d\] (.*)$", request.prompt, re.MULTILINE)
            assert queries[request.id] in request.prompt
            (relevant,) = judged[request.id]
            places = [i for i, line in enumerate(lines) if corpus[relevant].startswith(line)]
            made[request.id, 0] = f"{written(places)} are relevant" if places else "none"
        return made

    monkeypatch.setattr("expandr_jax.ranking.listwise.kept_texts", kept)
    config, names = small(), ["dense", "listwise:dense"]
    config.evaluation.listwise.depth = 12
    data, console = [str(tmp_path / "set")], Console(quiet=True)
    found = evaluate_beir(config, tmp_path / "out", data, names, "test", console)["set"]
    rows, (counted,) = found["rows"], found["listwise"]
    assert rows[1]["mrr@10"] == 1.0 > rows[0]["mrr@10"]
    assert (counted["system"], counted["answers"]) == ("listwise:dense", len(seen))
    assert counted["none"] + counted["missing"] == len(seen) == 4 * len(windows(12, 3, 1))
    (remark,) = found["remarks"]
    assert remark.startswith(f"listwise:dense: of {len(seen)} orders that were written ")
    assert {request.temperature for request in seen} == {0.0}


@pytest.mark.slow
def test_a_run_has_such_rows_and_keeps_their_counts(tmp_path):
    workdir, systems = tmp_path / "run", ["bm25", "expandr", "listwise:expandr"]
    lists = [f"--config.evaluation.listwise.{n}" for n in ("window=3", "stride=1", "depth=4",
             "passage_tokens=16", "depths=(2,4)")]  # fmt: skip
    short = [
        f"--config.{n}" for n in ("contrastive.epochs=0.5", "dpo.epochs=0.5", "data.max_test=6")
    ]
    options = [*lists, *short, "--config.generator.prompt_buckets=(96,224)"]

    def run(names):
        systems = f"--config.evaluation.systems={tuple(names)}"
        finish(start(workdir, systems, *options))
        return json.loads((workdir / "results.json").read_text())

    found = run(systems)
    (counted,) = found["listwise"]
    assert counted["system"] == "listwise:expandr"
    depth = found["chosen"]["listwise:expandr"]["depth"]
    assert counted["answers"] == found["queries"] * len(windows(depth, 3, 1))
    assert found["remarks"][-1].startswith("listwise:expandr: of ")
    searches = json.loads((workdir / "timings.json").read_text())["searches"]
    (timed,) = (row for row in searches if row["system"] == "listwise:expandr")
    assert timed["queries"] == found["queries"]
    assert timed["seconds"] > 0
    fused = run([*systems, "interpolation:bm25:listwise:expandr"])
    assert fused["listwise"] == [counted]
    assert [row for row in fused["rows"] if row in found["rows"]] == found["rows"]


@pytest.mark.slow
def test_a_window_that_does_not_fit_is_a_line(tmp_path):
    write_set(tmp_path / "set", random.Random(0))
    process = command(
        "eval.beir", "--config=configs/smoke.py", f"--data={tmp_path / 'set'}",
        "--systems=bm25,listwise:bm25", f"--workdir={tmp_path / 'out'}",
    )  # fmt: skip
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "window is 10: so many passages, each of 8 tokens at least, are too" in error_of(output)
