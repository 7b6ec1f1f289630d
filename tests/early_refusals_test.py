"""What cannot work is refused before the work that would come first."""

import contextlib
import dataclasses
import io
import json
import types

import jax
import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.loading import load_models
from expandr_jax.objectives.adapter_stage import adapter_round
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import make_mesh
from tests.commands import data_of
from train import joint

COUNT = 40


def write(directory, *, grade=1, text="word {i} of a document", document="d{i}", same=""):
    """A collection in BEIR layout whose query i asks for document i; all of test is alike."""
    (directory / "qrels").mkdir(parents=True)
    lines = {
        "corpus": [{"_id": f"d{i}", "title": "", "text": text.format(i=i)} for i in range(COUNT)],
        "queries": [{"_id": f"q{i}", "text": same or f"query {i}"} for i in range(2 * COUNT)],
    }
    for name, rows in lines.items():
        text_ = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text_)
    train = [f"q{i}\td{i}\t1" for i in range(COUNT)]
    test = [f"q{COUNT + i}\t{document.format(i=i)}\t{grade}" for i in range(COUNT)]
    for split, rows in {"train": train, "test": test}.items():
        (directory / "qrels" / f"{split}.tsv").write_text(
            "\n".join(["query-id\tcorpus-id\tscore", *rows, ""])
        )
    return directory


def config_of(directory):
    config = smoke.get_config()
    config.data.update(kind="beir", path=str(directory))
    config.data.shares.dev = 0.2
    config.contrastive.batch_size = 8
    return config


def prepare(config, workdir):
    console = Console(file=io.StringIO(), width=200)
    with contextlib.closing(Run(workdir, read_config(config), console)) as run:
        return data_of(run), console.file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grade": 0},
            "no test query has a relevant document in the corpus; expected grades above 0",
        ),
        ({"document": "other{i}"}, "no test query has a relevant document in the corpus"),
        ({"text": "  "}, "no document has a text"),
        ({"same": "one query"}, r"no train queries; expected some in qrels/train.tsv"),
    ],
)
def test_a_collection_that_teaches_or_tests_nothing(tmp_path, changes, message):
    config = config_of(write(tmp_path / "set", **changes))
    with pytest.raises(UserError, match=f"^beir data: {message}"):
        prepare(config, tmp_path / "run")


def test_a_collection_without_dev_queries_says_how_to_have_some(tmp_path):
    config = config_of(write(tmp_path / "set"))
    config.data.shares.dev = 0.0
    message = "no dev queries; expected some in qrels/dev.tsv, or a larger data.shares.dev"
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "run")


def test_dev_judgements_that_are_all_wrong(tmp_path):
    source = write(tmp_path / "set")
    lines = (source / "qrels" / "test.tsv").read_text().replace("\t1\n", "\t0\n")
    (source / "qrels" / "dev.tsv").write_text(lines)
    message = "no dev query has a relevant document in the corpus; .* in qrels/dev.tsv"
    with pytest.raises(UserError, match=message):
        prepare(config_of(source), tmp_path / "run")


def test_train_judgements_that_are_all_wrong(tmp_path):
    source = write(tmp_path / "set")
    train = source / "qrels" / "train.tsv"
    train.write_text(train.read_text().replace("\t1\n", "\t0\n"))
    message = "no train queries; expected some in qrels/train.tsv that have a relevant document and"
    with pytest.raises(UserError, match=message):
        prepare(config_of(source), tmp_path / "run")


def test_queries_that_are_left_out_are_said(tmp_path):
    source = write(tmp_path / "set")
    data, said = prepare(config_of(source), tmp_path / "one")
    assert "left out" not in said
    path = source / "queries.jsonl"
    path.write_text(path.read_text().replace(f'query {COUNT}"', 'Query 3"'))
    for _ in range(2):  # Also where the run goes on.
        data, said = prepare(config_of(source), tmp_path / "two")
        assert "  1 training queries are left out: they are dev or test queries, too\n" in said
    assert "q3" not in data.retriever_train + data.generator_train


NEAR = "which of the many functions of this library pads the last axis of an array"


@pytest.mark.parametrize("near", [NEAR.upper() + "?", f"tell me {NEAR}", NEAR.removesuffix("y")])
@pytest.mark.parametrize("where", ["set", "other"])
def test_queries_that_are_nearly_tested_are_left_out(tmp_path, near, where):
    """A training query is worded almost as one of the collection's own, or of a further one."""
    for name in ("set", "other"):
        queries = write(tmp_path / name) / "queries.jsonl"
        rows = [json.loads(line) for line in queries.read_text().splitlines()]
        for row in rows:
            row["text"] = f"{name} {row['text']}"
        if name == "set":
            rows[3]["text"] = NEAR
        if name == where:
            rows[COUNT]["text"] = near
        queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path / "set")
    config.data.tests = (str(tmp_path / "other"),)
    exact = near == NEAR.upper() + "?"
    for _ in range(2):
        data, said = prepare(config, tmp_path / "run")
        nearly = "" if exact else " (1 of them nearly)"
        assert f"1 training queries are left out: they are dev or test queries, too{nearly}" in said
    assert "q3" not in data.retriever_train + data.generator_train
    noted = json.loads((tmp_path / "run" / "data" / "SOURCE.json").read_text())
    assert (noted["left_out_for_tests"], noted["nearly_tests"]) == (1, not exact)


def test_documents_that_are_judged_in_both_splits_stay_and_are_counted(tmp_path):
    """Test query i of `write` asks for the document of training query i."""
    data, said = prepare(config_of(write(tmp_path / "set")), tmp_path / "run")
    train, *held_out = (
        {document for judged in data.collection.qrels[split].values() for document in judged}
        for split in ("train", "dev", "test")
    )
    both = train & set.union(*held_out)
    assert both
    assert f"  {len(both)} documents are judged for training and for dev or test" in said
    assert both <= data.collection.corpus.keys()


def test_negatives_that_are_nowhere(tmp_path, monkeypatch):
    config = config_of(write(tmp_path / "set"))
    config.contrastive.negatives, config.mining.per_query = 1, 0
    refuse = lambda *_, **__: pytest.fail("loaded the models first")  # noqa: E731
    monkeypatch.setattr(joint, "load_models", refuse)
    with pytest.raises(UserError, match=r"contrastive.negatives is 1, .* mining.per_query"):
        joint.train_joint(config, tmp_path / "run", Console(quiet=True))


@pytest.mark.parametrize("name", ["corpus", "gain"])
def test_answers_that_nobody_gives(tmp_path, monkeypatch, name):
    source = write(tmp_path / "set")
    config = config_of(source)
    config.reward.update({"corpus": 0.0, name: 1.0, f"{name}_measure": "hit"})

    def loads(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(joint, "load_models", loads)
    with pytest.raises(
        UserError, match=rf"^reward\.{name}_measure is 'hit', and no query that tra"
    ):
        joint.train_joint(config, tmp_path / "run", Console(quiet=True))
    path = source / "queries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["answers"] = [f"answer {i}", "other"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(NotImplementedError):  # It goes on where there are some.
        joint.train_joint(config, tmp_path / "other", Console(quiet=True))
    data, _ = prepare(config, tmp_path / "third")
    assert data.collection.answers.keys() == data.collection.queries.keys()
    assert data.collection.answers["q7"] == ("answer 7", "other")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lora.targets", ("q_proj", "nosuch"), "'nosuch' matches no projection"),
        ("lora.rank", 1_000_000, "rank 1000000 is above .*; lower lora.rank"),
        ("generator.slots", 12, "generator.slots 12 must be a multiple of 8"),
    ],
)
def test_settings_that_do_not_fit_the_generator(setting, value, message):
    config = smoke.get_config()
    section, name = setting.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message):
        load_models(read_config(config), lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo.batch_size": 3}, "dpo.batch_size 3 must be a multiple of 2"),
        ({"step_b": "grpo", "grpo.queries": 3}, "grpo.queries 3 must be a multiple of 2"),
        ({"step_b": "grpo", "grpo.queries": 8}, "grpo.queries 8: there are 6 queries to train"),
        ({"step_b": "grpo", "warm_start": "best", "dpo.batch_size": 3}, "dpo.batch_size 3 must"),
        ({"step_b": "grpo", "dpo.batch_size": 3}, None),  # Nothing is trained by it.
    ],
)
def test_what_step_b_cannot_train_with_is_refused_before_step_a(changes, message):
    config = with_settings(read_config(smoke.get_config()), {"grpo.queries": 2, **changes})
    data = types.SimpleNamespace(generator_train=[f"q{i}" for i in range(6)])
    data.collection = types.SimpleNamespace(corpus={})
    refused = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with refused:
        joint.check_step_b(config, data, make_mesh(devices=jax.devices()[:2]))


@pytest.mark.parametrize(
    ("size", "message"),
    [(3, "^mine.batch_size 3 must be a multiple of 2"), (2, "^0 pairs to train .* expected 2 or")],
)
def test_a_round_names_the_section_that_it_learns_by(size, message):
    settings = read_config(smoke.get_config()).dpo
    settings = dataclasses.replace(settings, batch_size=size)
    objective = dataclasses.replace(
        OBJECTIVES["sigmoid"], examples="pairs", tokenizer=lambda *_: None
    )
    config = types.SimpleNamespace(max_positions=8)
    generator = types.SimpleNamespace(module=types.SimpleNamespace(config=config))
    mesh = make_mesh(devices=jax.devices()[:2])
    model = types.SimpleNamespace(generator=generator, dpo_mesh=mesh)
    reporter = Reporter(Console(file=io.StringIO()))
    with pytest.raises(UserError, match=message):
        adapter_round(objective, "mine", settings, model, [], 0, 0, reporter)
