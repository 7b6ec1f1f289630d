"""200 seeded ways of spoiling a file of each format: a line or a count, never a traceback.

Each file goes the way it goes in `eval.data` or `eval.compare`, to the last table.
"""

import gzip
import io
import json
import random
import shutil
import zipfile

import pyarrow.parquet
import pytest
from rich.console import Console

from eval.compare import score
from eval.data import check
from eval.description import word_lengths
from expandr_jax.data.beir import read_qrels
from expandr_jax.data.trec import read_topics
from expandr_jax.errors import UserError
from expandr_jax.report.differences import compare
from tests.beir_test import mutate

WORDS = ["array", "sort", "pad", "matrix", "inverse", "scale", "gradient", "list"]
# What may stand where a text or a number is expected.
VALUES = [
    None, True, 0, -1, 1.5, 10**30, "", " ", "\t", "a b", "\ud800", "\x00", "d1", "q1", [], {},
    ["x"], {"_id": "x"}, "x" * 100_000,
]  # fmt: skip


def write_collection(directory):
    """Twelve documents, six queries, judgements of train and test."""
    rng = random.Random(0)
    (directory / "qrels").mkdir(parents=True)
    rows = {
        "corpus": [{"_id": f"d{i}", "title": "t", "text": " ".join(rng.choices(WORDS, k=6))}
                   for i in range(12)],
        "queries": [{"_id": f"q{i}", "text": " ".join(rng.choices(WORDS, k=3))} for i in range(6)],
    }  # fmt: skip
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    for split, queries in (("train", range(3)), ("test", range(3, 6))):
        text = "".join(f"q{i}\td{i + j}\t{1 - j}\n" for i in queries for j in (0, 1))
        (directory / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{text}")
    return directory


def spoil_json(data, rng):
    """One value of one line is another, is missing, or stands beside an unknown one."""
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    row = json.loads(lines[number])
    name = rng.choice([*row])
    kind = rng.randrange(4)
    if kind == 0:
        del row[name]
    elif kind == 1:
        row[rng.choice(["extra", "metadata", name.upper()])] = rng.choice(VALUES)
    else:
        row[name] = rng.choice(VALUES)
    lines[number] = json.dumps(row)
    if rng.random() < 0.1:
        lines[number] = rng.choice(["[" * 100_000, "1e999", "NaN", '{"_id": 1e999}', "{}", "\\"])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def spoil_columns(data, rng):
    """One line has a column too many, too few or another, or stands twice."""
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    columns = lines[number].split("\t") if "\t" in lines[number] else lines[number].split()
    place = rng.randrange(len(columns))
    kind = rng.randrange(5)
    if kind == 0:
        del columns[place]
    elif kind == 1:
        columns.insert(place, rng.choice(["0", "extra", "", "é"]))
    elif kind == 2:
        wrong = [
            "",
            "-1",
            "1e9",
            "99999999999",
            "nan",
            "inf",
            "-inf",
            "1.0",
            "0x1",
            "q9",
            "\x00",
            "²",
        ]
        columns[place] = rng.choice(wrong)
    elif kind == 3:
        lines.insert(number, lines[rng.randrange(len(lines))])
    else:
        columns = [rng.choice(["", " ", "\t\t", "\r", "\ufeff", "#", "x" * 1_000_000])]
    lines[number] = ("\t" if "\t" in lines[number] else " ").join(columns)
    return rng.choice(["\n", "\r\n"]).join(lines).encode()


def spoil_parquet(data, rng):
    """Another column type, a column less, or values that are null."""
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    name = rng.choice(table.column_names)
    place = table.column_names.index(name)
    kind = rng.randrange(4)
    if kind == 0:
        table = table.drop_columns(name)
    elif kind == 1:
        others = [
            [None],
            [1],
            [1.5],
            [b"\xff"],
            [["x"]],
            [{"a": 1}],
            [True],
            ["a b"],
            [float("nan")],
        ]
        table = table.set_column(place, name, [rng.choice(others) * len(table)])
    elif kind == 2:
        table = pyarrow.concat_tables([table, table])
    else:
        table = table.slice(0, rng.randrange(len(table)))
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def to_parquet(directory):
    """The collection in the layout of the hub."""
    for name in ("corpus", "queries"):
        path = directory / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        (directory / name).mkdir()
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), directory / name / "a-00000-of-00001.parquet"
        )
        path.unlink()
    (directory / "default").mkdir()
    for path in (directory / "qrels").glob("*.tsv"):
        fields = ("query-id", "corpus-id", "score")
        rows = [dict(zip(fields, line.split("\t"), strict=True))
                for line in path.read_text().splitlines()[1:]]  # fmt: skip
        rows = [{**row, "score": int(row["score"])} for row in rows]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), directory / "default" / f"{path.stem}.parquet"
        )
    shutil.rmtree(directory / "qrels")


def to_gzip(directory):
    for path in [*directory.rglob("*.jsonl"), *directory.rglob("*.tsv")]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def to_zip(directory):
    path = directory / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in [*directory.rglob("*.jsonl"), *directory.rglob("*.tsv")]:
            archive.write(file, file.relative_to(directory))
            file.unlink()
    shutil.rmtree(directory / "qrels")


# Format -> what makes it of a plain collection, the files that are spoilt, and its own mutations.
COLLECTIONS = {
    "corpus.jsonl": (None, "corpus.jsonl", spoil_json),
    "queries.jsonl": (None, "queries.jsonl", spoil_json),
    "qrels.tsv": (None, "qrels/*.tsv", spoil_columns),
    "parquet": (to_parquet, "*/*.parquet", spoil_parquet),
    "gzip": (to_gzip, "**/*.gz", None),
    "zip": (to_zip, "*.zip", None),
}


@pytest.mark.parametrize("kind", COLLECTIONS)
def test_a_spoilt_collection_ends_in_one_line_or_in_counted_ones(tmp_path, kind):
    convert, pattern, spoil = COLLECTIONS[kind]
    directory = write_collection(tmp_path / "set")
    if convert:
        convert(directory)
    source = directory / "set.zip" if kind == "zip" else directory
    files = sorted(directory.glob(pattern))
    assert check_quietly(source) == (0, "")
    rng, counts = random.Random(f"collection {kind}"), {"refused": 0, "counted": 0, "read": 0}
    for number in range(200):
        path = rng.choice(files)
        data = path.read_bytes()
        path.write_bytes((spoil if spoil and number % 2 else mutate)(data, rng))
        mistakes, complaint = check_quietly(source)
        counts["refused" if complaint else "counted" if mistakes else "read"] += 1
        if complaint:
            check_complaint(complaint, directory)
        path.write_bytes(data)
    assert counts["refused"] + counts["counted"] > 50, counts


def test_spoilt_triples_end_in_one_line_or_in_counted_ones(tmp_path):
    rng, counts = random.Random("triples"), {"refused": 0, "counted": 0, "read": 0}
    texts = [" ".join(rng.choices(WORDS, k=6)) for _ in range(60)]
    rows = [
        {"query": texts[i], "positive": texts[i + 1], "negative": [texts[i + 2]]}
        for i in range(0, 60, 3)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / "nq.jsonl"
    for number in range(200):
        spoilt = (spoil_json if number % 2 else mutate)(data, rng)
        packed = number % 4 > 1
        if packed:
            spoilt = (
                mutate(gzip.compress(data, mtime=0), rng) if number % 2 else gzip.compress(spoilt)
            )
        source = path.with_name("nq.jsonl.gz") if packed else path
        source.write_bytes(spoilt)
        mistakes, complaint = check_quietly(source)
        counts["refused" if complaint else "counted" if mistakes else "read"] += 1
        if complaint:
            check_complaint(complaint, source)
    assert counts["refused"] + counts["counted"] > 50, counts


def check_quietly(source):
    """How many lines `eval.data` counts as wrong, and what it ends with."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    try:
        mistakes = check(source, word_lengths(), 0.5, console)
    except UserError as error:
        return 0, str(error)
    errors = [line for line in output.getvalue().splitlines() if line.startswith("error: ")]
    assert len(errors) == min(mistakes, 20)
    for line in errors:
        check_complaint(line.removeprefix("error: "), source)
    return mistakes, ""


def complaint_of(read, place):
    """What a reader complains of, checked to be one line that begins with the place."""
    with pytest.raises(UserError) as caught:
        read()
    check_complaint(str(caught.value), place)
    return str(caught.value)


def check_complaint(complaint, place):
    assert complaint.startswith(f"{place}"), complaint[:300]
    assert len(complaint.splitlines()) == 1, complaint[:300]
    assert len(complaint) < 600, complaint[:300]


RUN = "".join(f"q{i // 4} Q0 d{i} {i % 4 + 1} {20.5 - i} tag\n" for i in range(16))
JUDGED = "".join(f"q{i // 4} 0 d{i} {i % 2}\n" for i in range(16))
AD_HOC = "".join(f"<top>\n<num> Number: {i}\n<title> {WORDS[i]} it\n</top>\n" for i in range(6))
XML = "".join(f'<topic number="{i}"><query>{WORDS[i]} it</query></topic>\n' for i in range(6))
LINES = "".join(f"{i}\t{WORDS[i]} it\n" for i in range(6))


def read_run(path):
    """As `eval.compare` does, against a run that is whole."""
    other = path.with_name("whole.trec")
    other.write_text(RUN)
    values = score([other, path], {"q0": {"d1": 1}, "q1": {"d4": 1, "d5": 0}}, ["ndcg@10", "map"])
    return compare(values, "whole")


@pytest.mark.parametrize(
    ("read", "text", "spoil"),
    [
        (read_run, RUN, spoil_columns),
        (read_qrels, JUDGED, spoil_columns),
        (read_topics, AD_HOC, None),
        (read_topics, XML, None),
        (read_topics, LINES, spoil_columns),
    ],
    ids=["run", "qrels.trec", "topics ad hoc", "topics xml", "topics lines"],
)
def test_a_spoilt_file_of_trec_ends_in_one_line_or_is_read(tmp_path, read, text, spoil, request):
    path = tmp_path / "spoilt.trec"
    path.write_text(text)
    assert read(path)
    rng, refused = random.Random(request.node.callspec.id), 0
    for number in range(200):
        path.write_bytes((spoil if spoil and number % 2 else mutate)(text.encode(), rng))
        try:
            read(path)
        except UserError as error:
            refused += 1
            check_complaint(str(error), path)
    assert refused > 20


def refused_mutations(directory, names, load):
    """How many of 200 changes of a model's files its loader refuses, each in one line."""
    rng, refused = random.Random(0), 0
    for _ in range(200):
        file = directory / rng.choice(names)
        data = file.read_bytes()
        # A weights file's header says where everything is.
        head = min(len(data), 3000 if file.suffix == ".safetensors" else len(data))
        file.write_bytes(mutate(data[:head], rng) + data[head:])
        try:
            load(str(directory))
        except UserError as error:
            refused += 1
            check_complaint(str(error), directory)
        file.write_bytes(data)
    return refused
