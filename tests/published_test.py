"""Published means beside runs: which rows are above, to the digits that were published."""

import csv
import io
import json
import random

import pytest

from expandr_jax import metrics
from expandr_jax.errors import UserError
from expandr_jax.report.published import PUBLISHED_HEADER, published_rows, read_published
from tests.beir_test import mutate
from tests.commands import ROOT, command, finish
from tests.compare_test import QRELS, RANKS, paths, reciprocal  # noqa: F401 (a fixture)
from tests.mutations_test import check_complaint

TABLE = """\
metric,system,collection,value,note
RR@10,one,here,0.37,"with a comma, none"
mrr@10, two ,here,0.3686,
nDCG@10,three,here,0.9,
mrr@10,one,there,0.1,
"""


def write(tmp_path, text, name="table.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_table_of_either_kind(tmp_path):
    found = read_published(write(tmp_path, TABLE), "here")
    assert [(one.system, one.metric, one.value, one.digits) for one in found] == [
        ("one", "RR@10", 0.37, 2), ("two", "mrr@10", 0.3686, 4), ("three", "nDCG@10", 0.9, 1),
    ]  # fmt: skip
    rows = [
        {"system": "a", "collection": "here", "metric": "ndcg@10", "value": 0.640},
        {"system": "b", "collection": "here", "metric": "ndcg@10", "value": "0.640"},
    ]
    path = write(tmp_path, json.dumps(rows), "table.json")
    # A number of JSON has no digits that are zero at its end; a string keeps them.
    assert [(one.value, one.digits) for one in read_published(path, None)] == [(0.64, 2), (0.64, 3)]


def test_the_table_of_docs_is_read():
    for name in ("scifact", "nfcorpus"):
        found = read_published(ROOT / "docs" / "published.csv", name)
        assert len(found) == 12
        assert {one.digits for one in found} == {4}


def test_a_mean_is_compared_to_the_digits_that_were_published(tmp_path):
    mean = sum(reciprocal("base")) / len(QRELS)
    assert f"{mean:.5f}" == "0.36875"
    values = {"base": {"mrr@10": dict(zip(QRELS, reciprocal("base"), strict=True))}}
    for value, place in (
        ("0.37", "equal"), ("0.36", "above"), ("0.38", "below"), ("0.3686", "above"),
        ("0.4", "equal"), ("0.36875", "equal"), ("1e-1", "above"),
    ):  # fmt: skip
        text = f"system,collection,metric,value\ns,c,mrr@10,{value}\n"
        (one,) = read_published(write(tmp_path, text), None)
        ((measure, name, shown, run, *numbers, said),) = published_rows([one], values)
        assert (measure, name, run, said) == ("mrr@10", "s", "base", place), value
        assert float(shown) == float(value)
        low, high = metrics.bootstrap_interval(reciprocal("base"))
        assert numbers == [
            f"{mean:.4f}", f"{low:.4f}", f"{high:.4f}", f"{mean - float(value):+.4f}",
        ]  # fmt: skip


def test_as_a_command(paths, tmp_path):  # noqa: F811
    table = write(tmp_path, TABLE)
    output = finish(command(
        "eval.compare", *map(str, paths), f"--qrels={tmp_path / 'qrels.trec'}", "--measures=p@1",
        "--format=csv", f"--published={table}", "--collection=here",
    ))  # fmt: skip
    rows = list(csv.reader(io.StringIO(output)))
    start = rows.index(list(PUBLISHED_HEADER))
    said = {(row[0], row[1], row[3]): row[-1] for row in rows[start + 1 :] if row}
    assert len(said) == 3 * len(RANKS)
    assert said["RR@10", "one", "base"] == "equal"
    assert said["mrr@10", "two", "base"] == "above"
    assert said["mrr@10", "two", "better"] == "above"
    assert said["nDCG@10", "three", "other"] == "below"


HEAD = "system,collection,metric,value\n"


@pytest.mark.parametrize(
    ("name", "text", "collection", "complaint"),
    [
        ("t.csv", "", None, "t.csv:1: no column system, collection, metric, value; expected a hea"),
        ("t.csv", "system,metric,value\n", None, "t.csv:1: no column collection"),
        ("t.csv", HEAD, None, "t.csv: empty; expected rows of system, collection, metric, value"),
        ("t.csv", HEAD + "a,c,ndcg@10,64.5\n", None, "t.csv:2: value is 64.5; expected a share"),
        ("t.csv", HEAD + "a,c,ndcg@10,nan\n", None, "t.csv:2: value is nan; expected a share of 1"),
        ("t.csv", HEAD + "a,c,ndcg@10,\n", None, "t.csv:2: value is ''; expected some text"),
        ("t.csv", HEAD + "a,c,gain,0.1\n", None, "t.csv:2: measure 'gain' is unknown"),
        ("t.csv", HEAD + "a,c\n", None, "t.csv:2: metric is None; expected some text"),
        ("t.csv", HEAD + "a,c,ndcg@10,0.1\na,c,nDCG@10,0.2\n", None, "t.csv:3: a has another nDCG"),
        ("t.csv", HEAD + "a,c,p@5,0.1\na,d,p@5,0.2\n", None, "t.csv: has c, d; choose one by --"),
        ("t.csv", HEAD + "a,c,p@5,0.1\n", "d", "t.csv: nothing on 'd'; there is c"),
        ("t.csv", HEAD + "a,c,ndcg@10,0,645\n", None, "t.csv:2: more columns than the header"),
        ("t.csv", HEAD[:-1] + ",value\n", None, "t.csv:1: column value stands twice"),
        ("t.csv", HEAD + "a,c,ndcg@10,0.6_4\n", None, "t.csv:2: value is 0.6_4; expected a share"),
        ("t.json", "[", None, "t.json: not JSON"),
        ("t.json", '{"system": 1}', None, "t.json: expected a JSON list of objects"),
        ("t.json", '[{"system": "a", "collection": "c", "metric": "p@5", "value": null}]', None,
         "t.json: number 1: value is None; expected some text"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, name, text, collection, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        read_published(write(tmp_path, text, name), collection)
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_command_in_a_line(paths, tmp_path):  # noqa: F811
    published = f"--published={tmp_path / 'none.csv'}"
    process = command(
        "eval.compare", str(paths[0]), f"--qrels={tmp_path / 'qrels.trec'}", published
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "none.csv: cannot read it: No such file" in output
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["table.csv", "table.json"])
def test_200_mutations_of_a_table_end_in_one_line_or_are_read(tmp_path, name):
    rows = [{"system": f"s{i}", "collection": "c", "metric": "ndcg@10", "value": f"0.{i}5"}
            for i in range(8)]  # fmt: skip
    data = json.dumps(rows) if name.endswith("json") else HEAD + "".join(
        f"s{i},c,ndcg@10,0.{i}5\n" for i in range(8)
    )  # fmt: skip
    path, rng, refused = write(tmp_path, data, name), random.Random(name), 0
    for _ in range(200):
        path.write_bytes(mutate(data.encode(), rng))
        try:
            read_published(path, None)
        except UserError as error:
            refused += 1
            check_complaint(str(error), path)
    assert refused > 80, refused
