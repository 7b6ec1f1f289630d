"""`train.orders`: lists, orders and comparisons from triples, and a generator that learns them."""

import json
import math
import random
import re

import pytest
from rich.console import Console

from configs import listwise, smoke
from eval.beir import evaluate_beir
from expandr_jax.config import read_config
from expandr_jax.data.triples import read_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.ranking.orders import order_rows
from expandr_jax.weights.hf import load_generator
from tests.commands import command, error_of
from tests.listwise_test import WORDS, write_set
from train.export import export_one
from train.generator import read_rows, train_adapter
from train.orders import make_orders

QUIET = Console(quiet=True)


def write_triples(path, count=12, extra=()):
    draw = random.Random(0)
    rows = [
        {
            "query": f"query {i} {draw.choice(WORDS)}",
            "pos": [f"good {i} {n}" for n in range(1 + i % 3)],
            "neg": [f"bad {i} {n}" for n in range(1 + i % 5)],
        }
        for i in range(count)
    ]
    write_jsonl(path, [*rows, *extra])
    return path


def small():
    config = listwise.get_config()
    tiny = smoke.get_config()
    config.generator = tiny.generator
    config.retriever = tiny.retriever
    config.generator.prompt_buckets = (220,)
    config.evaluation.listwise.update(window=3, stride=1, depth=4, passage_tokens=12)
    config.dpo.update(
        prompt_length=220, response_length=32, batch_size=8, epochs=1.0, dev_share=0.0,
        learning_rate=1e-2, eval_every=0,
    )  # fmt: skip
    return config


def gain(order, passages):
    """What an order is worth, in plain Python."""
    return sum(
        1 / math.log2(rank + 1)
        for rank, place in enumerate(order, 1)
        if passages[place].startswith("good")
    )


def places(text):
    return [int(number) - 1 for number in re.findall(r"\d+", text)]


def parsed(row):
    """A row's passages, as its prompt shows them, and its better and worse order."""
    passages = re.findall(r"^\[\d\] (.*)$", row["prompt"], re.MULTILINE)
    if row["task"] == "order":
        return passages, places(row["chosen"]), places(row["rejected"])
    orders = dict(re.findall(r"^([AB]): (.*)$", row["prompt"], re.MULTILINE))
    return passages, places(orders[row["chosen"]]), places(orders[row["rejected"]])


@pytest.mark.parametrize(("window", "lists", "auxiliary"), [(5, 3, 1.0), (3, 1, 0.5), (2, 2, 0.0)])
def test_the_better_order_is_worth_more_in_both_tasks(tmp_path, window, lists, auxiliary):
    triples, _ = read_triples(write_triples(tmp_path / "triples.jsonl", 60))

    def rows(triples, seed=0):
        options = {"window": window, "lists": lists, "auxiliary": auxiliary, "seed": seed}
        return [*order_rows(triples, lambda query, texts, ask: ask(query, texts), **options)]

    made = rows(triples)
    found = {"order": 0, "compare": 0}
    rejected, letters = [], set()
    for row in made:
        found[row["task"]] += 1
        passages, better, worse = parsed(row)
        assert sorted(better) == sorted(worse) == list(range(len(passages)))
        assert 2 <= len(passages) == len({*passages}) <= window
        assert {passage.split()[0] for passage in passages} == {"good", "bad"}
        assert gain(better, passages) > gain(worse, passages) + 1e-9
        number = re.search(r"Query: query (\d+) ", row["prompt"])[1]
        assert {passage.split()[1] for passage in passages} == {number}
        assert [c["text"] for c in row["candidates"]] == [row["chosen"], row["rejected"]]
        if row["task"] == "order":
            best = sorted(range(len(passages)), key=lambda i: passages[i].startswith("bad"))
            assert better == best
            rejected.append(worse == sorted(worse))
        else:
            letters.add(row["chosen"])
    assert found["order"] == 60 * lists
    assert abs(found["compare"] - auxiliary * found["order"]) < 10
    assert letters == ({"A", "B"} if auxiliary else set())
    assert {*rejected} == {True, False} or window == 2
    # What is drawn depends on the query and the seed.
    assert sorted(map(json.dumps, rows(triples[::-1]))) == sorted(map(json.dumps, made))
    assert made != rows(triples, seed=1)


@pytest.mark.parametrize("step_b", ["dpo", "reward-sft"])
def test_the_file_is_read_whole_by_what_trains(tmp_path, step_b):
    extra = [{"query": "alone", "pos": ["good"]}, {"query": "same", "pos": ["a"], "neg": ["a"]}]
    triples = write_triples(tmp_path / "triples.jsonl", extra=extra)
    config, to = small(), tmp_path / "orders.jsonl"
    assert make_orders(config, triples, to, QUIET) == {"order": 12, "compare": 12}
    config.step_b = step_b
    config, generator = read_config(config), load_generator(str(smoke.MODELS / "tiny-llama"))[0]
    objective = OBJECTIVES["reward-sft" if step_b != "dpo" else "sigmoid"]
    rows, dropped = read_rows(objective, config, to, generator, own=False)
    assert (len(rows), dropped) == (24, {})
    examples, cut = objective.tokenize(generator, rows, config.dpo)
    assert (len(examples), cut) == (24, 0)  # Of candidates the better ones alone.
    first = json.loads(to.read_text().splitlines()[0])
    answer = generator.decode(examples[0].ids[1])
    assert answer.strip() == first["chosen"]


def test_triples_without_negatives_are_refused(tmp_path):
    write_jsonl(tmp_path / "triples.jsonl", [{"query": "a", "pos": ["b"]}])
    with pytest.raises(UserError, match=r"triples\.jsonl: no query has a negative; those that a r"):
        make_orders(small(), tmp_path / "triples.jsonl", tmp_path / "orders.jsonl", QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["triples.jsonl"]


@pytest.mark.slow
def test_a_generator_learns_to_write_orders_and_its_row_shows_it(tmp_path):
    write_set(tmp_path / "set", random.Random(0))
    triples, to = write_triples(tmp_path / "triples.jsonl", 48), tmp_path / "orders.jsonl"
    config = small()
    config.evaluation.listwise.update(window=2, depth=3)
    make_orders(config, triples, to, QUIET, lists=2, auxiliary=0.0)
    config.data.path, config.step_b, config.dpo.epochs = str(to), "reward-sft", 6.0
    config.lora.update(rank=16, targets=("_proj$",), dropout=0.0)
    train_adapter(config, tmp_path / "run", QUIET)
    export_one(tmp_path / "run", tmp_path / "model", "generator", "float32")
    counts = {}
    for name, source in (("before", config.generator.source), ("after", tmp_path / "model")):
        config.generator.source = str(source)
        config.evaluation.update(query_weights=(0.5,), samples=(1,))
        found = evaluate_beir(
            config, tmp_path / name, [str(tmp_path / "set")], ["listwise:dense"], "test", QUIET
        )
        (counts[name],) = found["set"]["listwise"]
    assert counts["before"]["none"] == counts["before"]["answers"] == 8
    # So small and random, it learns to name passages, not which.
    assert counts["after"]["none"] <= 2, counts


@pytest.mark.slow
def test_a_missing_file_is_a_line(tmp_path):
    arguments = f"--to={tmp_path / 'orders.jsonl'}", f"--triples={tmp_path / 'none.jsonl'}"
    process = command("train.orders", "--config=configs/listwise.py", *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert f"{tmp_path / 'none.jsonl'}: " in error_of(output)
