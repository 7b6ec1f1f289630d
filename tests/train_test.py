"""`train.joint` end to end on the smoke config: the file contract, restarts, and bad input."""

import json
import math
import pathlib
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import pytrec_eval
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from expandr_jax.rewards import ranks as rewards
from tests.commands import COST_FIELDS, finish, start

SYSTEMS = [
    "bm25", "zero-shot", "zero-shot+expansion", "fine-tuned", "fine-tuned+expansion",
    "expandr", "expandr-base-generator", "expandr-plain",
]  # fmt: skip


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_ends_with_the_table_and_the_report(smoke):
    workdir, output = smoke
    for system in SYSTEMS:
        assert system in output
    assert f"report: {workdir / 'report.html'}" in output
    assert (workdir / "report.html").stat().st_size > 10_000


def test_config_records_what_ran(smoke):
    config = json.loads((smoke[0] / "config.json").read_text())
    assert config["seed"] == 0
    assert config["config"]["expansion"]["strategy"]
    assert config["versions"]["jax"]
    assert config["device"]["platform"] == "cpu"


def test_results_have_every_system_and_test(smoke):
    results = json.loads((smoke[0] / "results.json").read_text())
    assert list(results) == ["dataset", "queries", "chosen", "rows", "significance"]
    assert [row["system"] for row in results["rows"]] == SYSTEMS
    assert set(results["chosen"]) == {s for s in SYSTEMS if "expandr" in s or "+" in s} - {
        "expandr-plain"
    }
    compared = {t["baseline"] for t in results["significance"] if t["metric"] == "ndcg@10"}
    assert compared == set(SYSTEMS) - {"expandr"}


def test_the_choices_are_the_best_of_those_tried(smoke):
    results = json.loads((smoke[0] / "results.json").read_text())
    tried = list(map(json.loads, (smoke[0] / "evaluation/choices.jsonl").read_text().splitlines()))
    for system, chosen in results["chosen"].items():
        mine = [row for row in tried if row["system"] == system]
        assert len(mine) > 1
        (taken,) = (row for row in mine if chosen.items() <= row.items())
        assert taken["ndcg@10"] == max(row["ndcg@10"] for row in mine)
    assert {row["system"] for row in tried} == set(results["chosen"])


def test_trec_eval_finds_the_same_metrics_in_the_runs(smoke):
    workdir, _ = smoke
    results = json.loads((workdir / "results.json").read_text())
    qrels: dict = {}
    for line in (workdir / "qrels.trec").read_text().splitlines():
        query, _, document, grade = line.split()
        qrels.setdefault(query, {})[document] = int(grade)
    assert len(qrels) == results["queries"]
    measures = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100", "map": "map"}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, set(measures.values()))
    for row in results["rows"]:
        run: dict = {}
        for line in (workdir / "runs" / f"{row['system']}.trec").read_text().splitlines():
            query, _, document, rank, score, tag = line.split()
            assert tag == row["system"]
            run.setdefault(query, {})[document] = float(score)
            assert int(rank) == len(run[query])
        scored = evaluator.evaluate(run)
        for ours, theirs in measures.items():
            mean = sum(scored.get(q, {}).get(theirs, 0.0) for q in qrels) / len(qrels)
            assert row[ours] == pytest.approx(mean, abs=2e-6)


def test_a_checkpoint_of_the_generator_is_the_adapter_and_its_moments_alone(smoke):
    workdir, _ = smoke
    steps = [path for path in (workdir / "checkpoints" / "generator").iterdir() if path.is_dir()]
    assert steps
    adapter = load_file(workdir / "export" / "adapter" / "adapter_model.safetensors")
    numbers = sum(tensor.size for tensor in adapter.values())
    for step in steps:
        saved = ocp.StandardCheckpointer().metadata(step / "state").item_metadata.tree
        shapes = {
            kind: [math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]
            for kind, tree in saved.items()
        }
        assert sum(shapes["params"]) == numbers
        assert sum(shapes["opt_state"]) <= 3 * numbers + 8  # Two moments, a sum, some counters.


def test_candidates_can_be_recomputed_from_what_is_written(smoke):
    workdir, _ = smoke
    candidates = rows(workdir / "round-0" / "candidates.jsonl")
    assert candidates
    for row in candidates:
        column = {k: np.array([c[k] for c in row["candidates"]]) for k in row["candidates"][0]
                  if k not in ("text", "reward_terms")}  # fmt: skip
        for kind in ("positive", "answer"):
            ranks = rewards.ranks(column[f"similarity_{kind}"])
            np.testing.assert_array_equal(ranks, column[f"rank_{kind}"])
            terms = [c["reward_terms"][kind] for c in row["candidates"]]
            np.testing.assert_allclose(terms, 1 / ranks)
        totals = [sum(c["reward_terms"].values()) for c in row["candidates"]]
        np.testing.assert_allclose(column["reward"], totals)
    by_query = {row["query_id"]: row for row in candidates}
    pairs = rows(workdir / "round-0" / "preferences.jsonl")
    assert pairs
    for pair in pairs:
        row = by_query[pair["query_id"]]
        values = [c["reward"] for c in row["candidates"]]
        texts = [c["text"] for c in row["candidates"]]
        assert pair["chosen"] == texts[int(np.argmax(values))]
        assert pair["rejected"] == texts[int(np.argmin(values))]
        assert pair["reward_chosen"] == max(values)
        assert pair["reward_rejected"] == min(values)
        assert row["query"] in pair["prompt"]


def test_negatives_are_what_the_untrained_retriever_ranks_highest_of_what_is_wrong(smoke):
    """Recomputed from the vectors of the run and sentence-transformers' of the queries."""
    workdir, _ = smoke
    source = json.loads((workdir / "data" / "SOURCE.json").read_text())
    triples = rows(workdir / "round-0" / "triples.jsonl")
    assert [row["query_id"] for row in triples] == source["retriever_train"]
    corpus = rows(workdir / "data" / "corpus.jsonl")
    texts = [f"{row['title']} {row['text']}".strip() for row in corpus]
    vectors = np.load(workdir / "work" / "vectors" / "zero-shot.npy")
    model = SentenceTransformer("configs/tiny/tiny-bert", device="cpu")
    model.max_seq_length = 16
    queries = model.encode([row["query"] for row in triples], normalize_embeddings=True)
    for row, scores in zip(triples, queries @ vectors.T, strict=True):
        wrong = {t: s for t, s in zip(texts, scores, strict=True) if t not in row["pos"]}
        assert row["pos"]
        assert len(row["neg"]) == 4
        np.testing.assert_allclose(
            [wrong[text] for text in row["neg"]], sorted(wrong.values())[:-5:-1], atol=1e-5
        )


def test_expansions_cover_every_split(smoke):
    workdir, _ = smoke
    source = json.loads((workdir / "data" / "SOURCE.json").read_text())
    training = rows(workdir / "round-0" / "expansions.jsonl")
    assert {row["query_id"] for row in training} == set(source["retriever_train"])
    fresh = rows(workdir / "evaluation" / "expansions.jsonl")
    assert {row["split"] for row in fresh} == {"dev", "test"}
    assert {row["system"] for row in fresh} == {
        "zero-shot+expansion", "fine-tuned+expansion", "expandr", "expandr-base-generator",
    }  # fmt: skip


def test_metrics_have_each_step_once(smoke):
    lines = rows(smoke[0] / "metrics.jsonl")
    seen = [(m["phase"], m["round"], m["step"]) for m in lines]
    assert len(seen) == len(set(seen))
    for line in lines:
        costs = {name: line[name] for name in COST_FIELDS if name in line}
        # This machine's peak is in no table.
        assert set(costs) == {"step_seconds", "tokens_per_second", "memory_bytes"}
        assert min(costs.values()) > 0
        # What is NaN or infinite in either stops the run.
        assert line["phase"].endswith("-dev") or {"loss", "grad_norm"} <= set(line)
    assert {phase for phase, _, _ in seen} >= {"fine-tuned", "retriever", "generator"}
    assert list((smoke[0] / "tensorboard").glob("events.out.tfevents.*"))


def test_exports_load_in_the_pytorch_world(smoke):
    export = smoke[0] / "export"
    vectors = SentenceTransformer(str(export / "retriever"), device="cpu").encode(["a b", "c"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(export / "generator")
    tokenizer = AutoTokenizer.from_pretrained(export / "generator")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**chat, max_new_tokens=3).shape[1] > chat["input_ids"].shape[1]
    assert (export / "adapter" / "adapter_config.json").exists()


def test_a_finished_run_is_left_as_it_is(smoke):
    workdir, _ = smoke

    def phases() -> dict[str, float]:
        timings = json.loads((workdir / "timings.json").read_text())
        return {row["phase"]: row["seconds"] for row in timings["phases"]}

    before, done = (workdir / "results.json").stat().st_mtime_ns, phases()
    output = finish(start(workdir))
    assert "expandr-plain" in output
    assert f"report: {workdir / 'report.html'}" in output
    assert (workdir / "results.json").stat().st_mtime_ns == before
    # No model was loaded, nothing encoded and no index built: the report alone is made again.
    after = phases()
    assert {name for name in after if after[name] != done.get(name)} == {"report"}


def refused(
    tmp_path: pathlib.Path, *overrides: str, config="configs/smoke.py", workdir=None
) -> str:
    """The one line a mistake is answered with."""
    process = start(workdir or tmp_path / "run", *overrides, config=config)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    last = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(last) == 1, output
    return last[0]


def test_unknown_config_key(tmp_path):
    message = refused(tmp_path, "--config.contrastive.lerning_rate=1")
    assert "lerning_rate" in message
    assert "learning_rate" in message


def test_unknown_flag(tmp_path):
    assert "wrokdir" in refused(tmp_path, "--wrokdir=x")


def test_missing_config_file(tmp_path):
    assert "configs/nothing.py" in refused(tmp_path, config="configs/nothing.py")


def test_missing_package(tmp_path):
    message = refused(tmp_path, "--config.data.packages=('no-such-package==1.0',)")
    assert "no-such-package" in message


def test_wrong_package_version(tmp_path):
    assert "0.0.1" in refused(tmp_path, "--config.data.packages=('optax==0.0.1',)")


def test_wrong_hash(tmp_path):
    assert "sha256" in refused(tmp_path, "--config.generator.sha256=" + 64 * "0")


def test_more_memory_for_sampling_than_there_may_be(tmp_path):
    message = refused(tmp_path, "--config.generator.memory_limit=0.0001")
    assert "sampling needs 0.000" in message
    assert "may use 0.0001; take fewer slots" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dpo.batch_size=3", "dpo.batch_size 3 must be a multiple of 2"),
        ("contrastive.batch_size=5", "contrastive.batch_size 5 and micro_batch 0 do not fit"),
        ("contrastive.batch_size=40", "32 training queries do not fill one batch of 40"),
        ("contrastive.dimensions=(8,33)", "must lie between 1 and 32"),
    ],
)
def test_what_the_devices_cannot_take_is_refused_before_any_work(tmp_path, override, expected):
    assert expected in refused(tmp_path, f"--config.{override}")
    assert not list((tmp_path / "run" / "work").glob("vectors/*"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mesh.dpo=(1,3,1)", "mesh.dpo: mesh data=1 fsdp=3 tensor=1 does not fit 2 devices"),
        ("mesh.sampling=(1,2)", "mesh.sampling is (1, 2); expected (data, fsdp, tensor)"),
        ("mesh.tensor=3", "mesh.contrastive: mesh data=-1 fsdp=1 tensor=3 does not fit 2 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, override, expected
):
    assert expected in refused(tmp_path, f"--config.{override}")
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_config(smoke):
    message = refused(None, "--config.seed=1", workdir=smoke[0])
    assert "seed was 0, now 1" in message


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(tmp_path, workdir=tmp_path / "file" / "run")


def test_workdir_in_use(tmp_path):
    first = start(tmp_path / "run")
    try:
        while not (tmp_path / "run" / "config.json").exists():
            assert first.poll() is None
            time.sleep(0.05)
        assert "another process" in refused(tmp_path)
    finally:
        first.kill()
        first.communicate()


def write_beir(directory: pathlib.Path, documents: list[str], queries: list[str]) -> pathlib.Path:
    """A BEIR directory in which query i's document is document i."""
    (directory / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    asked = [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)]
    for name, lines in (("corpus", corpus), ("queries", asked)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    count = len(queries)
    for split, part in (("train", range(count * 3 // 4)), ("test", range(count * 3 // 4, count))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in part)]
        (directory / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return directory


def beir(directory: pathlib.Path) -> list[str]:
    return ["--config.data.kind=beir", f"--config.data.path={directory}"]


def test_empty_corpus(tmp_path):
    data = write_beir(tmp_path / "data", [], [])
    assert "corpus" in refused(tmp_path, *beir(data))


def test_empty_query(tmp_path):
    data = write_beir(tmp_path / "data", ["a document"] * 4, ["first", "", "third", "fourth"])
    assert "queries.jsonl:2" in refused(tmp_path, *beir(data))


def test_text_that_is_not_utf8(tmp_path):
    data = write_beir(tmp_path / "data", ["a document"] * 4, ["one", "two", "three", "four"])
    with open(data / "corpus.jsonl", "ab") as file:
        file.write(b'{"_id": "x", "text": "\xff"}\n')
    assert "corpus.jsonl:5" in refused(tmp_path, *beir(data))


@pytest.mark.slow
def test_a_beir_directory_with_a_text_of_100_000_words(tmp_path):
    documents = [f"document number {i} about topic {i % 7}" for i in range(60)]
    documents[0] = "word " * 100_000
    data = write_beir(tmp_path / "data", documents, [f"topic {i}" for i in range(60)])
    overrides = ["--config.data.shares.dev=0.3", "--config.contrastive.batch_size=4"]
    overrides += ["--config.evaluation.samples=(1,)", "--config.candidates.temperatures=(1.0, 1.1)"]
    finish(start(tmp_path / "run", *beir(data), *overrides))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["dataset"] == "data"
