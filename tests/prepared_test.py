"""Prepared sets hold the triples that the plain reader gives, shuffled and mixed by weight."""

import json
import pathlib

import pytest

from expandr_jax.data.prepared import Triples, part_of, read_split, shuffled, split_name
from expandr_jax.data.triples import read_triples
from expandr_jax.errors import UserError

SHARES = {"retriever": 7.0, "generator": 1.0, "dev": 0.5, "test": 0.0}


def write_triples(path: pathlib.Path, source: str, count: int) -> None:
    lines = [
        {"query": f"{source} {i}?", "positive": f"right {i}", "negative": f"wrong {i % 7}"}
        for i in range(count)
    ]
    path.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / f"{source}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A directory of three sources, and the set prepared of it."""
    path = tmp_path_factory.mktemp("echo") / "echo-data"
    for source, count in (("nq", 300), ("squad", 200), ("msmarco_passage", 100)):
        write_triples(path, source, count)
    return path, Triples(path, data_dir=path.parent / "prepared", shares=SHARES).prepare()


def test_triples_are_those_of_the_plain_reader(echo):
    path, prepared = echo
    for file in path.glob("*.jsonl"):
        expected, _ = read_triples(file)
        for part in SHARES:
            mine = [triple for triple in expected if part_of(triple.query, SHARES) == part]
            if mine:
                assert list(read_split(prepared, split_name(file.stem, part))) == mine
            else:
                assert part == "test"
                assert split_name(file.stem, part) not in prepared.info.splits


def test_every_field_of_a_triple(tmp_path):
    line = {"query": "q", "pos": ["a", "ü\u2028"], "neg": ["b"], "expansion": ["", "x"],
            "teacher_scores": [0.1, 1e-9, 123456789.123]}  # fmt: skip
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    prepared = Triples(tmp_path, data_dir=tmp_path / "p", shares={"all": 1.0}).prepare()
    assert list(read_split(prepared, "one_all")) == read_triples(tmp_path / "one.jsonl")[0]


def test_seven_to_one():
    parts = [part_of(f"query {i}", {"retriever": 7, "generator": 1}) for i in range(4000)]
    assert parts.count("generator") / len(parts) == pytest.approx(1 / 8, abs=0.02)
    assert part_of("a  b\n", SHARES) == part_of("a b", SHARES)


def test_prepared_once_for_each_state_of_the_source(tmp_path):
    path, root = tmp_path / "echo", tmp_path / "prepared"
    write_triples(path, "nq", 20)
    counts = []
    first = Triples(path, data_dir=root, shares=SHARES).prepare(counts.append)
    assert sum(counts) == 20
    again = Triples(path, data_dir=root, shares=SHARES).prepare(counts.append)
    assert again.data_path == first.data_path
    assert sum(counts) == 20
    write_triples(path, "nq", 21)
    left = Triples(path, data_dir=root, shares=SHARES).data_path.parent / "incomplete.X_1.0.0"
    left.mkdir(parents=True)  # As a kill leaves it.
    changed = Triples(path, data_dir=root, shares=SHARES).prepare()
    assert changed.data_path != first.data_path
    assert not left.exists()
    assert sum(split.num_examples for split in changed.info.splits.values()) == 21
    other = Triples(path, data_dir=root, shares={"retriever": 1.0}).prepare()
    assert other.data_path not in (first.data_path, changed.data_path)
    assert json.loads((changed.data_path / "metadata.json").read_text())["source"]["files"]


def test_mistakes_are_named_and_leave_nothing(tmp_path):
    path = tmp_path / "echo"
    write_triples(path, "nq", 5)
    with open(path / "nq.jsonl", "a") as file:
        file.write('{"query": "x"}\n')
    with pytest.raises(UserError, match=r"nq\.jsonl:6: no positive"):
        Triples(path, data_dir=tmp_path / "p", shares={"all": 1.0}).prepare()
    assert not list((tmp_path / "p").rglob("dataset_info.json"))
    with pytest.raises(UserError, match=r"no \.jsonl file"):
        Triples(tmp_path / "nothing", data_dir=tmp_path, shares=SHARES)
    with pytest.raises(UserError, match="shares"):
        Triples(path, data_dir=tmp_path, shares={"retriever": -1.0})


def test_damage_is_refused(tmp_path):
    write_triples(tmp_path / "echo", "nq", 2000)
    prepared = Triples(tmp_path / "echo", data_dir=tmp_path / "p", shares={"all": 1.0}).prepare()
    (file,) = prepared.data_path.glob("*.array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        list(read_split(prepared, "nq_all"))


def part(echo, name="retriever"):
    _, prepared = echo
    return [read_split(prepared, split_name(source, name)) for source in ("nq", "squad")]


def test_the_shuffle_is_over_all_rows_and_another_in_each_epoch(echo):
    parts = part(echo)
    everything = sorted(triple.query for source in parts for triple in source)
    data = shuffled(parts, seed=1)
    count = len(everything)
    order = [data[i].query for i in range(2 * count)]
    assert sorted(order[:count]) == sorted(order[count:]) == everything
    assert order[:count] != order[count:]
    assert order[:count] != [shuffled(parts, seed=2)[i].query for i in range(count)]
    first = order[: count // 4]
    assert {query.split()[0] for query in first} == {"nq", "squad"}


def test_sources_are_mixed_by_weight(echo):
    data = shuffled(part(echo), seed=1, weights=(1, 3))
    names = [data[i].query.split()[0] for i in range(len(data))]
    assert names.count("nq") / len(names) == pytest.approx(1 / 4, abs=0.01)
    assert len({data[i].query for i in range(len(data))}) == len(data)
    with pytest.raises(UserError, match="weights"):
        shuffled(part(echo), seed=1, weights=(1,))
