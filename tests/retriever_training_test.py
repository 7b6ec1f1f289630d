"""`train.retriever` on a file of triples: it learns, resumes, keeps the best, exports, refuses."""

import gc
import io
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

from configs import base
from expandr_jax import metrics
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.contrastive_batches import make_batch
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.stage import train_stage
from tests.commands import command, step_metrics
from train.retriever import train_on_triples

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
WORDS = ["array", "gradient", "loss", "norm", "scale", "shape", "step", "count"]
# A document says with other words what its query says.
OTHER = dict(zip(WORDS, WORDS[3:] + WORDS[:3], strict=True))
PAIRS = [(f"{a} {b}", f"{OTHER[b]} of {OTHER[a]}") for a in WORDS for b in WORDS if a != b]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of triples, and a dev collection in which query i's document is document i."""
    directory = tmp_path_factory.mktemp("data")
    rows = [
        {
            "query": query,
            "pos": [document, f"the {document}"],
            "neg": [PAIRS[(i + 1) % len(PAIRS)][1], PAIRS[(i + 9) % len(PAIRS)][1]],
            "expansion": f"{query} {document}",
            "teacher_scores": [2.0, 2.0, 0.0, 1.0],
        }
        for i, (query, document) in enumerate(PAIRS)
    ]
    write_jsonl(directory / "triples.jsonl", rows)
    write_dev(directory / "dev", {f"q{i}": {f"d{i}": 1} for i in range(len(PAIRS))})
    return directory


def write_dev(directory, qrels):
    """The documents and queries of PAIRS, with these dev judgements."""
    corpus = {f"d{i}": document for i, (_, document) in enumerate(PAIRS)}
    queries = {f"q{i}": query for i, (query, _) in enumerate(PAIRS)}
    write_beir(directory, Collection("dev", corpus, queries, {"dev": qrels}))


def config_of(data, **contrastive):
    config = base.get_config()
    config.data.kind = "triples"
    config.data.path = str(data / "triples.jsonl")
    config.data.dev = str(data / "dev")
    config.retriever.source = TINY
    config.retriever.max_length = 16
    settings = {"batch_size": 16, "epochs": 4.0, "learning_rate": 3e-3, "eval_every": 4,
                "temperature": 0.1, "save_every": 3, "negatives": 1, "plain_share": 0.25,
                "kl_weight": 0.1, **contrastive}  # fmt: skip
    config.contrastive.update(settings)
    return config


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(config, workdir):
    train_on_triples(config, workdir, Console(quiet=True))


def test_batches_by_length_are_padded_less(data, tmp_path, monkeypatch):
    rows = read_rows(data / "triples.jsonl")
    for i, row in enumerate(rows):
        row["expansion"] = " ".join([row["expansion"]] * (1 if i % 8 else 6))
    write_jsonl(tmp_path / "triples.jsonl", rows)
    widths, first = {}, {}

    def recorded(*args, **options):
        batch = make_batch(*args, **options)
        widths[window].append(batch["expansion_ids"].shape[1])
        return first.setdefault("batch", batch)  # One program: all that counts is what was made.

    monkeypatch.setattr("expandr_jax.objectives.contrastive_steps.make_batch", recorded)
    for window in (0, 100):
        widths[window] = []
        config = config_of(data, length_window=window, epochs=1.0, batch_size=8, plain_share=0.0)
        config.data.path, config.data.dev = str(tmp_path / "triples.jsonl"), ""
        config.retriever.max_length = 64
        train(config, tmp_path / f"run-{window}")
    assert len(widths[0]) == len(widths[100]) == len(rows) // 8
    assert sum(widths[100]) < 0.8 * sum(widths[0])


def dev_rows(workdir):
    return read_rows(workdir / "work" / "round-0" / "retriever-dev.jsonl")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config_of(data), workdir)
    return workdir


def test_it_learns_and_its_export_scores_the_same_in_sentence_transformers(data, finished):
    rows = dev_rows(finished)
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    best = max(row["ndcg@10"] for row in rows)
    assert best > rows[0]["ndcg@10"] + 0.1

    peer = SentenceTransformer(str(finished / "export" / "retriever"), device="cpu")
    queries, documents = (peer.encode(list(texts)) for texts in zip(*PAIRS, strict=True))
    scores = queries @ documents.T
    found = {
        f"q{i}": {f"d{j}": float(score) for j, score in enumerate(row)}
        for i, row in enumerate(scores)
    }
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(len(PAIRS))}
    theirs = metrics.mean(metrics.evaluate(found, qrels, ("ndcg@10",))["ndcg@10"])
    assert theirs == pytest.approx(best, abs=1e-3)


class Killed(Exception):
    pass


def interrupted(config, workdir, monkeypatch, saves):
    """Ends a run before one of its saves, as a kill would."""
    left, save = [saves], Checkpoints.save

    def until_killed(self, step, tree):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        save(self, step, tree)
        self.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", until_killed)
        try:
            train(config, workdir)
        except Killed:
            left[0] = -1
    assert left[0] == -1
    gc.collect()  # Closes the lock that the process would have held until its end.


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(data, finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    for saves in (2, 1):
        interrupted(config_of(data), workdir, monkeypatch, saves)
    train(config_of(data), workdir)
    for name in (
        "work/round-0/retriever-dev.jsonl", "export/retriever/model.safetensors",
    ):  # fmt: skip
        assert (workdir / name).read_bytes() == (finished / name).read_bytes(), name
    assert step_metrics(workdir) == step_metrics(finished)


@pytest.fixture
def tokenized(monkeypatch):
    """How many texts are tokenized, in a list of its own."""
    count, token_ids = [0], Retriever.token_ids

    def counted(self, texts, *args):
        count[0] += len(texts)
        return token_ids(self, texts, *args)

    monkeypatch.setattr(Retriever, "token_ids", counted)
    return count


def test_a_finished_run_is_left_as_it_is(data, finished, tokenized):
    path = finished / "export" / "retriever" / "model.safetensors"
    before = path.stat().st_mtime_ns, (finished / "metrics.jsonl").read_bytes()
    train(config_of(data), finished)
    assert (path.stat().st_mtime_ns, (finished / "metrics.jsonl").read_bytes()) == before
    assert tokenized == [0]


def test_a_run_whose_checkpoints_know_tokens_alone_goes_on(data, tmp_path, monkeypatch, tokenized):
    config, asked, output = config_of(data, epochs=1.0), [], io.StringIO()
    config.data.dev, config.retriever.max_length = "", 4

    def as_before(*args, identity, older, **how):
        identity = {name: value for name, value in identity.items() if name != "texts"}
        asked.append(older())
        assert asked[0].keys() == {"examples", "all"}
        return train_stage(*args, identity=identity | asked[0], older=dict, **how)

    with monkeypatch.context() as patch:
        patch.setattr("expandr_jax.objectives.contrastive_stage.train_stage", as_before)
        train(config, tmp_path / "run")
    gc.collect()
    before, tokenized[0] = (tmp_path / "run" / "metrics.jsonl").read_bytes(), 0
    train_on_triples(config, tmp_path / "run", Console(file=output, width=200))
    assert tokenized[0] > 0
    lost = r"\d+ documents, \d+ expansions are longer than the retriever reads, and lose their end"
    assert re.search(lost, output.getvalue())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    gc.collect()
    monkeypatch.setattr(
        "expandr_jax.objectives.packed_examples.ExampleHashes.all", "of other tokens"
    )
    with pytest.raises(UserError, match="another base model or other settings"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("way", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_export_is_made_again(data, finished, tmp_path, way):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    path = workdir / "export" / "retriever" / "model.safetensors"
    content = path.read_bytes()
    half = len(content) // 2
    if way == "delete":
        path.unlink()
    else:
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        path.write_bytes({"flip": flipped, "truncate": content[:half], "empty": b""}[way])
    train(config_of(data), workdir)
    assert path.read_bytes() == content


def test_without_a_gain_it_stops_and_keeps_the_first_weights(data, tmp_path):
    # The first of equal values counts: a rate of next to nothing never gains.
    train(config_of(data, learning_rate=1e-30, patience=2), tmp_path / "run")
    assert [row["step"] for row in dev_rows(tmp_path / "run")] == [0, 4, 8]
    ours = SentenceTransformer(str(tmp_path / "run" / "export" / "retriever"), device="cpu")
    theirs = SentenceTransformer(TINY, device="cpu")
    np.testing.assert_array_equal(ours.encode(WORDS), theirs.encode(WORDS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 64}, "do not fill one batch of 64"),
        ({"micro_batch": 5}, "micro_batch 5"),
        ({"micro_batch": 4}, "divide both"),
        ({"negatives": 0}, "negatives above 0"),
        ({"dimensions": (8, 33)}, "between 1 and 32"),
    ],
)
def test_settings_that_do_not_fit(data, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train(config_of(data, **settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Each of these would train for hours and change nothing.
        ({"batch_size": 1, "negatives": 0, "kl_weight": 0.0}, "compared with no other"),
        ({"info_nce_weight": 0.0, "kl_weight": 0.0, "invariance_weight": 1.0, "plain_share": 1.0},
         "nothing to learn"),
    ],
)  # fmt: skip
def test_what_teaches_nothing_is_refused(data, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train(config_of(data, **settings), tmp_path / "run")


def test_a_line_without_teacher_scores_is_named(data, tmp_path):
    rows = read_rows(data / "triples.jsonl")
    del rows[4]["teacher_scores"]
    path = tmp_path / "triples.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))  # A blank line first.
    config = config_of(data)
    config.data.path = str(path)
    with pytest.raises(UserError, match=r"^training query triples\.jsonl:6 has no teach"):
        train(config, tmp_path / "run")


def test_dev_data_that_tell_nothing_or_change_are_refused(data, tmp_path):
    config = config_of(data, epochs=1.0, eval_every=0)
    config.data.dev = str(tmp_path / "dev")
    config.data.max_dev = 2
    for qrels in ({"q1": {"d1": 0}}, {"q1": {"d1": -1, "elsewhere": 1}}):
        write_dev(tmp_path / "dev", qrels)
        with pytest.raises(UserError, match="dev: no dev query has a relevant document"):
            train(config, tmp_path / "run")
        gc.collect()
    # The mistake mended, the same command goes on: nothing was noted of what was refused.
    right = {f"q{i}": {f"d{i}": 1} for i in range(len(PAIRS))}
    write_dev(tmp_path / "dev", right)
    (tmp_path / "dev" / "qrels" / "train.tsv").write_text("q1\td1\t1\n")
    evaluated = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "evaluate", lambda run, qrels, names, of=metrics.evaluate: (
            evaluated.append(set(qrels)), of(run, qrels, names))[1])  # fmt: skip
        train(config, tmp_path / "run")
    assert [len(queries) for queries in evaluated] == [2, 2]
    gc.collect()
    # Judgements that are not read may change; an older run noted them all.
    noted = tmp_path / "run" / "data" / "SOURCE.json"
    source = json.loads(noted.read_text())
    assert "qrels/train.tsv" not in source["dev"]
    source["dev"]["qrels/train.tsv"] = "of the file then"
    noted.write_text(json.dumps(source))
    (tmp_path / "dev" / "qrels" / "train.tsv").write_text("q2\td2\t1\n")
    train(config, tmp_path / "run")
    gc.collect()
    write_dev(tmp_path / "dev", {**right, "q1": {"d2": 1}})
    with pytest.raises(UserError, match="dev: is not the data this run began with"):
        train(config, tmp_path / "run")


def test_dev_queries_that_are_trained_on_and_dev_documents_that_are_cut_are_counted(data, tmp_path):
    write_dev(tmp_path / "dev", {f"q{i}": {f"d{i}": 1} for i in range(4)})
    queries = tmp_path / "dev" / "queries.jsonl"
    queries.write_text(queries.read_text().replace(PAIRS[1][0], PAIRS[1][0].upper() + " ", 1)
                       .replace(PAIRS[2][0], "of something new", 1))  # fmt: skip
    documents = tmp_path / "dev" / "corpus.jsonl"
    documents.write_text(documents.read_text().replace(PAIRS[1][1], "of" + 20 * " of"))
    config = config_of(data, epochs=1.0, eval_every=2)
    config.data.dev = str(tmp_path / "dev")
    output = io.StringIO()
    train_on_triples(config, tmp_path / "run", Console(file=output, width=200))
    assert "3 of 4 dev queries are training queries, too" in output.getvalue()
    # Once, and not as often as dev is ranked.
    told = f"dev: 1 of {len(PAIRS)} texts that are read as documents (1.8 %) are longer than 16"
    assert output.getvalue().count(told) == 1
    assert output.getvalue().count("dev ndcg@10") > 1


def test_queries_of_a_test_collection_are_not_trained_on(data, tmp_path, monkeypatch):
    """Two of them are, one of them in capitals."""
    asked = {"q0": PAIRS[0][0].upper(), "q1": PAIRS[5][0], "q2": "another"}
    qrels = {"test": {query: {"d": 1} for query in asked}}
    write_beir(tmp_path / "bench", Collection("bench", {"d": "text"}, asked, qrels))
    config, output, trained = config_of(data), io.StringIO(), []
    config.data.tests = (str(tmp_path / "bench"),)
    monkeypatch.setattr(
        "train.retriever.train_retriever", lambda *_, ids, **__: trained.extend(ids)
    )
    monkeypatch.setattr("train.retriever.write_retriever", lambda *_: None)
    for _ in range(2):
        train_on_triples(config, tmp_path / "run", Console(file=output, width=200))
        assert "2 training queries are left out: they are test queries, too" in output.getvalue()
    assert len(trained) == 2 * (len(PAIRS) - 2)
    lines = {int(name.rpartition(":")[2]) for name in trained}
    assert lines == {*range(1, len(PAIRS) + 1)} - {1, 6}
    noted = json.loads((tmp_path / "run" / "data" / "SOURCE.json").read_text())
    assert noted["left_out_for_tests"] == 2


def test_another_file_in_the_same_workdir(data, tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_bytes((data / "triples.jsonl").read_bytes())
    config = config_of(data, batch_size=64)
    config.data.path = str(path)
    for message in ("do not fill", "is not the file this run began with"):
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "run")
        gc.collect()
        path.write_text('{"query": "x", "pos": "y"}\n' * 70)


def test_a_mistake_on_the_command_line_is_one_line(tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_text('{"query": "a", "pos": "b"}\n{"query": "a", "pos": ""}\n')
    process = command(
        "train.retriever", "--config=configs/retriever.py", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={path}",
    )  # fmt: skip
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert f"error: {path}:2: " in output
