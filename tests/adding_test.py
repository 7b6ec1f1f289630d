"""A run is added to: rounds, systems and test sets come to it, and what was done stays."""

import dataclasses
import io
import json
import pathlib
import shutil

import pytest
from rich.console import Console

from configs import smoke as smoke_config
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection, read_beir, source_hashes, write_beir
from expandr_jax.data.benchmarks import find_benchmarks
from expandr_jax.data.collect import check_added_tests
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json, write_jsonl
from expandr_jax.metrics import read_trec, write_trec
from expandr_jax.ranking.choices import Choice, PartWeights
from expandr_jax.runtime.run import Run
from tests.commands import finish, start
from train import evaluation
from train.evaluation import evaluate_benchmarks, result_files, systems_of_run
from train.joint import _grow, _note_tests, _results_if_done, _written
from train.kept import kept_results, read_chosen

BEFORE = read_config(smoke_config.get_config())
SYSTEMS = BEFORE.evaluation.systems
SETS = ("first", "second")
RESULTS = ("results.json", "qrels.trec", "runs", "evaluation", "round-0", "round-1", "tests")


def opened(workdir, grow=lambda run, grown: None, **settings):
    """A run of the smoke config with some settings (SECTION__NAME), opened and closed."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    run = Run(workdir, with_settings(BEFORE, named), Console(file=io.StringIO()), grow)
    run.close()
    return run


def recorded(workdir):
    return json.loads((workdir / "config.json").read_text())


def test_what_a_run_may_have_more_of(tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "run" / "work" / "of a stage").mkdir(parents=True)
    before, told = recorded(tmp_path / "run"), []
    longer = {
        "rounds": 2, "evaluation__systems": ("dense", *SYSTEMS), "data__tests": ("some", "more"),
    }  # fmt: skip
    opened(tmp_path / "run", lambda run, grown: told.append(grown), log__profile_steps=3, **longer)
    assert told == [{"data.tests": [], "evaluation.systems": [*SYSTEMS], "rounds": 1}]
    after = recorded(tmp_path / "run")
    assert after["config"]["rounds"] == 2
    assert after["config"]["data"]["tests"] == ["some", "more"]
    for section, name in (("evaluation", "systems"), ("data", "tests")):
        del before["config"][section][name], after["config"][section][name]
    del before["config"]["rounds"], after["config"]["rounds"]
    assert after == before  # All else is as it was, what may differ without being kept, too.
    opened(tmp_path / "run", lambda run, grown: pytest.fail("twice"), **longer)


def test_a_section_that_was_off_may_be_turned_on_as_one_likes(tmp_path):
    run, on = tmp_path / "run", {"distill__epochs": 2.0, "distill__depth": 3}
    opened(run)
    (run / "work" / "of a stage").mkdir(parents=True)
    record = recorded(run)
    del record["config"]["distill"]  # An older run had none.
    write_json(run / "config.json", record)
    told = []
    opened(run, lambda run, grown: told.append(grown), **on)
    assert told == [{"distill.epochs": 0.0, "distill.depth": 16}]
    section = dataclasses.asdict(BEFORE.distill) | {"epochs": 2.0, "depth": 3}
    assert recorded(run)["config"]["distill"] == json.loads(json.dumps(section))
    opened(run, lambda run, grown: pytest.fail("twice"), **on)
    for other in ({**on, "distill__depth": 4}, {"distill__epochs": 0.0}, {}):
        with pytest.raises(UserError, match=r"distill\.\w+ was .* use a new --workdir"):
            opened(run, **other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 1}, "rounds was 2, now 1"),
        ({"evaluation__systems": SYSTEMS[1:]}, r"evaluation.systems was \['bm25', 'zero-shot'"),
        ({"evaluation__systems": SYSTEMS[::-1]}, "evaluation.systems was"),
        ({"evaluation__systems": ("dense", *SYSTEMS[1:], "rrf:bm25:dense")}, "evaluation.systems"),
        ({"data__tests": ()}, r"data.tests was \['some'\], now \[\]"),
        ({"data__tests": ("other", "more")}, "data.tests was"),
        ({"rounds": 3, "seed": 1}, "another config .seed was 0, now 1.; use a new --workdir"),
    ],
)
def test_whatever_else_is_changed_is_refused(tmp_path, settings, message):
    begun = {"rounds": 2, "data__tests": ("some",)}
    opened(tmp_path / "run", **begun)
    (tmp_path / "run" / "work" / "of a stage").mkdir(parents=True)
    config = recorded(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "run", **(begun | settings))
    assert recorded(tmp_path / "run") == config


def test_killed_while_it_is_prepared_a_run_is_as_it_was(tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "run" / "work" / "of a stage").mkdir(parents=True)

    def killed(run, grown):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path / "run", killed, rounds=2)
        assert recorded(tmp_path / "run")["config"]["rounds"] == 1
    opened(tmp_path / "run")


def test_the_last_round_s_files_bear_its_name_where_more_follow(tmp_path):
    run = opened(tmp_path / "run")
    work = tmp_path / "run" / "work"
    names = (
        "vectors/expandr.npy", "vectors/expandr.npy.jsonl", "vectors/zero-shot.npy",
        "vectors/set/expandr.npy", "vectors/expandr.index/index.json", "evaluation-base.jsonl",
        "evaluation-trained.jsonl", "tests/set/evaluation-trained-keywords.jsonl.part",
        "vectors/round-0.npy",
    )  # fmt: skip
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    export = tmp_path / "run" / "export" / "retriever" / "file"
    export.parent.mkdir(parents=True)
    export.write_text("of the round before")
    run.checksums.record("export/retriever")
    for _ in range(2):  # Also after a kill.
        _grow(run, {"rounds": 3})
    found = {p.relative_to(work).as_posix(): p.read_text() for p in work.rglob("*") if p.is_file()}
    del found["seals.json"]
    assert found == {
        name.replace("vectors/expandr", "vectors/round-2").replace("set/expandr", "set/round-2")
        .replace("evaluation-trained", "evaluation-round-2"): name
        for name in names
    }  # fmt: skip
    assert not run.checksums.intact("export/retriever")


def test_what_a_run_was_trained_on_cannot_be_added_to_be_tested_on(tmp_path):
    text = "how to pad the last axis of an array with zeros"
    queries = {"q": f"{text} please", "r": "sort"}
    qrels = {"test": {query: {"d": 1} for query in queries}}
    for name, asked in (("near", {"q": text, "r": "x"}), ("far", {"q": "y", "r": "sorted"})):
        write_beir(tmp_path / name, Collection(name, {"d": "text"}, asked, qrels))
    data = tmp_path / "run" / "data"
    check_added_tests([str(tmp_path / "near")], data, {})  # They will be left out.
    write_beir(data, Collection("data", {"d": "text"}, queries, qrels))
    write_json(data / "SOURCE.json", {"retriever_train": ["r"], "generator_train": ["q"]})
    check_added_tests([str(tmp_path / "far")], data, {"d2q/d/0": "nothing of the kind"})
    with pytest.raises(UserError, match=r"has trained on 1 .*far.* as d2q/d/0;"):
        check_added_tests([str(tmp_path / "far")], data, {"d2q/d/0": "Sorted!"})
    with pytest.raises(UserError, match=r"data.tests: this run has trained on 1 .*near.* as q;"):
        check_added_tests([str(tmp_path / name) for name in ("far", "near")], data, {})


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_still_stands_of_results(tmp_path, rounds):
    """Parts without a row stand, too; after another round not what rests on the models before."""
    fused = "interpolation:bm25:dense"
    systems = ("bm25", "rrf:bm25:expandr", "zero-shot+expansion", fused, "dense")
    run = opened(tmp_path / "run", evaluation__systems=systems, rounds=rounds)
    choice = {"query_weight": 0.5, "samples": 1}
    results = {
        "rows": [{"system": name} for name in systems[:4]],
        "chosen": {
            "zero-shot+expansion": choice, fused: {"weights": [0.7, 0.3]}, "expandr": choice,
            "gone": choice,
        },
        "index_recall": [{"system": "expandr", "queries": 1, "recall@5": 0.5}],
    }  # fmt: skip
    for name in systems[:4]:
        write_trec(run.path("runs", f"{name}.trec"), {"q": {name: 1.0}}, name)
    for name in ("choices", "samples"):
        rows = [{"system": system} for system in ("zero-shot+expansion", "expandr", "gone")]
        write_jsonl(run.path("evaluation", f"{name}.jsonl"), rows)
    chosen = read_chosen(run.path("evaluation", "gates.json"), results["chosen"])
    systems = systems_of_run(run.config)
    kept = kept_results(run.workdir, results, systems, rounds, chosen, is_main=True)
    ours = rounds == 1
    names = ["bm25", *["rrf:bm25:expandr"] * ours, "zero-shot+expansion", fused]
    assert kept.runs == {name: {"q": {name: 1.0}} for name in names}
    leaves = ["zero-shot+expansion", *["expandr"] * ours]
    chosen = dict.fromkeys(leaves, Choice(0.5, 1))
    assert kept.choices == chosen | {fused: PartWeights((0.7, 0.3))}
    assert kept.tried == kept.samples == [{"system": name} for name in leaves]
    assert list(kept.recalls) == ["expandr"] * ours


def test_a_run_to_which_something_was_added_is_not_done(tmp_path):
    """Also where it was killed before anything was made of it."""
    systems = ("bm25", "dense")
    for name in ("first", "second"):
        judged = {"test": {"q": {"d": 1}}}
        write_beir(tmp_path / name, Collection(name, {"d": "text"}, {"q": "query"}, judged))
    tests = [str(tmp_path / name) for name in ("first", "second")]
    run = opened(tmp_path / "run", evaluation__systems=systems, data__tests=tests[:1])
    for folder in ("", "tests/first"):
        path = run.path(folder, "results.json")
        write_json(path, {"rows": [{"system": name} for name in systems]})
    for name in _written(run.config):
        if not run.path(name).exists():
            write_json(run.path(name, "file"), name)
    run.checksums.record(*_written(run.config))
    assert _results_if_done(run)["rows"][0] == {"system": "bm25"}
    for settings in (
        {"data.tests": tuple(tests)},
        {"evaluation.systems": (*systems, "zero-shot")},
        {"rounds": 2},
    ):
        run.config = with_settings(run.config, {"data.tests": tuple(tests[:1])} | settings)
        assert _results_if_done(run) is None
    # Killed between the run's own results and those of the collection.
    run.config = with_settings(run.config, {"rounds": 1, "evaluation.systems": systems})
    write_json(run.path("tests", "first", "results.json"), {"rows": [{"system": "bm25"}]})
    run.checksums.record(*_written(run.config))
    assert _results_if_done(run) is None


def test_a_test_collection_that_has_changed_is_refused(tmp_path, monkeypatch):
    """Before vectors and texts of its old rows are taken for those of the new ones."""
    corpus = {"d": "text", "e": "another"}
    judged = {"test": {"q": {"d": 1}}}
    write_beir(tmp_path / "first", Collection("first", corpus, {"q": "query"}, judged))
    tests = (str(tmp_path / "first"),)
    run = opened(tmp_path / "run", evaluation__systems=("bm25", "dense"), data__tests=tests)
    ranked = []

    def evaluate(run, models, data, *_, folder, chosen):
        ranked.append(list(data.collection.corpus))
        rows = [{"system": name} for name in run.config.evaluation.systems]
        write_json(run.path(folder, "results.json"), {"rows": rows})
        for name in ("qrels.trec", "runs/file", "evaluation/file"):
            write_json(run.path(folder, name), name)
        run.checksums.record(*result_files(folder))
        return {"rows": rows, "dataset": "first", "queries": 1}

    def scored():
        evaluate_benchmarks(run, None, {}, {}, {})

    monkeypatch.setattr(evaluation, "evaluate_systems", evaluate)
    monkeypatch.setattr(evaluation, "results_table", lambda results: "")
    _note_tests(run)
    path = tmp_path / "first" / "corpus.jsonl"
    before = path.read_text()
    path.write_text('{"_id": "new", "text": "first of all"}\n' + before)
    refused = "tests/first: was made with other data than .*first has now.* use a new --workdir"
    for _ in range(2):
        with pytest.raises(UserError, match=refused):
            scored()
    assert not ranked
    path.write_text(before)
    scored()
    scored()
    assert ranked == [["d", "e"]]
    # Nor are systems added whose rows would be of another corpus than those beside them.
    run.config = with_settings(run.config, {"evaluation.systems": ("bm25", "dense", "zero-shot")})
    path.write_text(before.replace("another", "changed"))
    with pytest.raises(UserError, match=refused):
        scored()
    path.write_text(before)
    scored()
    assert len(ranked) == 2


def test_documents_tell_a_collection_where_older_runs_noted_nothing_of_it(tmp_path):
    judged = {"test": {"q": {"d": 1}}}
    write_beir(tmp_path / "first", Collection("first", {"d": "text"}, {"q": "query"}, judged))
    run = opened(tmp_path / "run", data__tests=(str(tmp_path / "first"),))
    noted = run.path("tests", "first", "data", "SOURCE.json")
    read_beir(tmp_path / "first", store=run.path("work", "documents", "tests", "first"))
    path = tmp_path / "first" / "corpus.jsonl"
    before = path.read_text()
    path.write_text(before.replace("text", "changed"))
    refused = "tests/first: was made with other documents than .*first has now; put back"
    for _ in range(2):
        with pytest.raises(UserError, match=refused):
            _note_tests(run)
    assert not noted.exists()
    path.write_text(before)
    _note_tests(run)
    assert noted.exists()


def test_of_judgements_those_that_are_read_tell_a_collection(tmp_path):
    """Also where an older run noted all of them."""
    judged = {split: {"q": {"d": 1}} for split in ("train", "dev", "test")}
    write_beir(tmp_path / "first", Collection("first", {"d": "text"}, {"q": "query"}, judged))
    (benchmark,) = find_benchmarks([str(tmp_path / "first")]).values()
    files = {"corpus.jsonl", "queries.jsonl", "qrels/test.tsv"}
    assert benchmark.source("first")["files"].keys() == files
    assert benchmark.source("first", "dev")["files"].keys() == {*files, "qrels/dev.tsv"}
    run = opened(tmp_path / "run")
    noted = {**benchmark.source("first"), "files": source_hashes(benchmark.files)}
    assert len(noted["files"]) == 5
    write_json(run.path("tests", "first", "data", "SOURCE.json"), noted)

    def check(*others):
        source = benchmark.source("first", *others)
        run.check_source(run.path("tests", "first"), source, "it", benchmark.unread(*others))

    for split in ("train", "dev", "test"):
        check()
        path = tmp_path / "first" / "qrels" / f"{split}.tsv"
        path.write_text(path.read_text().replace("\t1\n", "\t2\n"))
        if split == "train":
            check("dev")
        else:
            with pytest.raises(UserError, match="was made with other data than it has now"):
                check("dev")
    with pytest.raises(UserError, match="was made with other data than it has now"):
        check()


def contents(workdir: pathlib.Path, *names: str) -> dict[str, bytes]:
    """The files of these names or below them, by their paths from the workdir."""
    paths = (p for name in names for p in (workdir / name, *(workdir / name).rglob("*")))
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in paths if p.is_file()}


@pytest.mark.slow
def test_a_finished_run_that_is_added_to_is_as_one_that_had_it_all_at_once(smoke, tmp_path):
    corpus = {f"d{i}": f"a text of number {i} and {i * i}" for i in range(30)}
    for name in SETS:
        queries = {f"q{i}": f"which {name} text has {i}" for i in range(6)}
        qrels = {"test": {f"q{i}": {f"d{i}": 1} for i in range(6)}}
        excluded = {f"q{i}": (f"d{i + 1}",) for i in range(6)} if name == "second" else {}
        write_beir(tmp_path / name, Collection(name, corpus, queries, qrels, excluded=excluded))
    tests = [str(tmp_path / name) for name in ("first", "second")]
    workdir = tmp_path / "grown"
    shutil.copytree(smoke[0], workdir)
    steps = (workdir / "metrics.jsonl").read_text()
    round_0 = contents(workdir, "round-0", "data")
    more = (
        "dense+prf-average", *SYSTEMS, "rrf:bm25:expandr", "bm25+expansion",
        "bm25+expansion+rm3", "bm25q+rm3", "interpolation:bm25:expandr",
        "interpolation:bm25:fine-tuned+prf-rocchio:zero-shot",
    )  # fmt: skip

    def settings(systems, tests, rounds=1):
        return [f"--config.evaluation.systems={systems}", f"--config.data.tests={tuple(tests)}",
                f"--config.rounds={rounds}"]  # fmt: skip

    # Systems and a test set come to it: nothing is trained, sampled or searched twice.
    before = contents(workdir, "runs", "evaluation/samples.jsonl")
    printed = finish(start(workdir, *settings(more, tests[:1])))
    assert (workdir / "metrics.jsonl").read_text() == steps
    assert "made again" not in printed
    assert contents(workdir, *before) == before
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    assert [row["system"] for row in rows] == list(more)
    assert (workdir / "tests" / "first" / "results.json").exists()
    # Then another round, with another set, and a row that trains a retriever of its own.
    more = (*more, "fine-tuned-all", "interpolation:bm25:fine-tuned-all")
    printed = finish(start(workdir, *settings(more, tests, 2)))
    assert "made again" not in printed
    after = (workdir / "metrics.jsonl").read_text()
    assert after.startswith(steps)
    added = [json.loads(line) for line in after.removeprefix(steps).splitlines()]
    assert {(row["phase"], row["round"]) for row in added} == {
        ("retriever", 1), ("generator", 1), ("fine-tuned-all", 0)
    }  # fmt: skip
    phases = [json.loads(line)["phase"] for line in steps.splitlines()]
    of_all = [row["step"] for row in added if row["phase"] == "fine-tuned-all"]
    assert len(of_all) == phases.count("fine-tuned") > 0
    assert contents(workdir, "round-0", "data") == round_0
    finish(start(tmp_path / "at-once", *settings(more, tests, 2)))
    assert contents(workdir, *RESULTS) == contents(tmp_path / "at-once", *RESULTS)
    for name in more:  # Of all rows, no excluded document is in those of the set that has some.
        of_set = {s: read_trec(workdir / "tests" / s / "runs" / f"{name}.trec") for s in SETS}
        found = {s: sum(f"d{i + 1}" in run[f"q{i}"] for i in range(6)) for s, run in of_set.items()}
        assert found == {"first": 6, "second": 0}, name
    weights = "export/retriever/model.safetensors", "export/generator/model.safetensors"
    assert contents(workdir, *weights) == contents(tmp_path / "at-once", *weights)
    assert len(contents(workdir, *weights)) == 2
