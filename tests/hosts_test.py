"""What a plan says of the hosts, against numbers counted by hand and files of a real run."""

import dataclasses
import gc
import tracemalloc
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import llama3_8b_anchordr
from configs import smoke as smoke_config
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.objectives.adapter import hold_out, make_examples
from expandr_jax.objectives.distillation import query_tokens
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.planning.host_stages import (
    CORE_SECONDS,
    DOCUMENT_BYTES,
    ENTRY,
    INDEX,
    LINE,
    STORED_EXAMPLE,
    STORED_TEXT,
    TERMS,
    TOKEN_BYTES,
    WORKER,
)
from expandr_jax.planning.hosts import host_rows, most_disk, show_hosts
from expandr_jax.planning.synthetic import Counts
from expandr_jax.planning.topology import Topology
from expandr_jax.runtime.chips import GIB
from expandr_jax.runtime.progress import Reporter
from expandr_jax.search import Bm25Index, ScannIndex, ScannOptions, scann
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.weights.hf import load_generator, load_retriever
from tests.eight_devices import CHIP, QUIET, machine
from train import distilled
from train.counts import PAPER_COUNTS, counts_of_tests
from train.plan import plan_misfits

TWICE = Counts(*(2 * number for number in dataclasses.astuple(PAPER_COUNTS)))


@pytest.fixture(scope="module")
def paper():
    return read_config(llama3_8b_anchordr.get_config())


def hosts(config, counts=PAPER_COUNTS, count=2, memory=192 * GIB, tests=()):
    devices = jax.devices("cpu")[:8]
    topology = Topology("hosts", devices, CHIP, devices[: 8 // count])
    return {row.stage: row for row in host_rows(config, counts, topology, memory, tests)}


def test_the_paper_s_run_is_counted(paper):
    rows = hosts(paper)
    # Vectors of the corpus before training, fine-tuned, and as ExpandR trains it.
    assert rows["corpus, encoded 3 times"].bytes_disk == 3 * 8_841_823 * 768 * 4
    # 32 of each query, 512 tokens each; and the answers.
    candidates = 3_200_000 * (512 * TOKEN_BYTES + LINE)
    assert rows["candidates"].bytes_disk == candidates
    assert rows["candidates"].bytes_network == candidates / 2  # The other host's.
    assert rows["rewards"].bytes_disk > candidates
    # Llama-3-8B, and T5-base of 223 million parameters.
    assert rows["export"].bytes_disk == pytest.approx(4 * 8.253e9, rel=0.001)
    fetched = 2 * 8.030e9 + 4 * 0.223e9  # In bfloat16 and float32.
    assert rows["models"].bytes_network == pytest.approx(fetched / 2, rel=0.001)
    assert all(row.fits for row in rows.values())
    assert all(row.seconds >= 0 for row in rows.values())


def test_of_texts_an_index_alone_grows_in_memory(paper):
    once, twice = hosts(paper), hosts(paper, TWICE)
    always = twice["export"].bytes_memory - once["export"].bytes_memory
    grown = {s: twice[s].bytes_memory - once[s].bytes_memory - always for s in once}
    for stage, texts in (
        ("expansions", 637_866),
        ("candidates", 3_200_000),
        ("rewards", 3_200_000),
    ):
        assert grown[stage] == pytest.approx(INDEX * texts), stage
    assert grown["step A, 2 trainings"] == pytest.approx((ENTRY + INDEX) * 637_866)
    assert grown["data"] > DOCUMENT_BYTES * 8_841_823
    assert grown["corpus, encoded 3 times"] == pytest.approx(0, abs=1)
    assert twice["candidates"].bytes_disk == 2 * once["candidates"].bytes_disk


def test_a_process_has_all_of_the_base_where_others_train_a_part(paper):
    one, two = hosts(paper, count=1), hosts(paper)
    held = two["export"].bytes_memory - one["export"].bytes_memory
    assert held == pytest.approx(2 * 8_030_261_248, rel=1e-4)
    assert all(row.bytes_network == 0 for row in one.values())


def test_on_policy_and_other_systems_have_their_own_rows(paper):
    changes = {"step_b": "grpo", "evaluation.systems": ("expandr", "bm25"), "rounds": 2}
    rows = hosts(with_settings(paper, changes))
    assert "GRPO" in rows
    assert "candidates" not in rows
    assert "corpus, encoded 2 times" in rows
    assert "step A, 2 trainings" in rows
    together = hosts(with_settings(paper, {**changes, "grpo.documents": 3}))
    assert together["GRPO"].bytes_network == 4 * rows["GRPO"].bytes_network


def test_a_baseline_on_all_labels_has_the_generator_s_queries_too(paper):
    """It was counted as if it had step A's alone."""
    change = {"evaluation.systems": ("expandr", "fine-tuned")}
    without = hosts(with_settings(paper, change))["step A, 2 trainings"]
    change = {"evaluation.systems": ("expandr", "fine-tuned-all")}
    found = hosts(with_settings(paper, change))["step A, 2 trainings"]
    assert found.bytes_memory - without.bytes_memory == pytest.approx((ENTRY + INDEX) * 100_000)
    assert found.seconds / without.seconds == pytest.approx(1 + 100_000 / (2 * 637_866))
    assert found.bytes_disk == without.bytes_disk


def test_hosts_share_the_tokens_of_step_a(paper):
    """Each took as long as one alone, and sent nothing."""
    one, four = (hosts(paper, count=count)["step A, 2 trainings"] for count in (1, 4))
    examples, kept = 2 * 637.866, CORE_SECONDS["example kept"]
    assert one.seconds == pytest.approx(examples * (CORE_SECONDS["example"] + kept))
    assert four.seconds == pytest.approx(examples * (CORE_SECONDS["example"] / 4 + kept))
    each = 2 + paper.expansion.train_samples + paper.contrastive.negatives
    tokens = 1000 * examples * each * paper.retriever.max_length
    assert four.bytes_network == pytest.approx(3 / 4 * (4 * tokens + 2 * 4 * 0.223e9), rel=0.01)


def test_indexes_are_counted_where_there_are_any(paper):
    rows = hosts(paper)
    words, documents = rows["BM25's index"], 8_841_823
    assert words.bytes_disk == documents * TERMS * 8
    assert words.bytes_scratch == 2 * words.bytes_disk  # What it is made of, and how it is made.
    # Lengths and scores of all passages, for as many queries as there may be threads.
    assert words.bytes_memory - rows["self-answers"].bytes_memory > 16 * 32 * documents
    # The paper's negatives are given, and its results searched exactly.
    assert not any(stage.startswith("ScaNN") for stage in rows)
    negatives = {"mining.per_query": 4}
    mined = hosts(with_settings(paper, negatives))["ScaNN, 1 index"]
    assert mined.bytes_disk == documents * (768 * 4 + 384 + 8)
    both = hosts(with_settings(paper, {**negatives, "reward.corpus": 1.0}))["ScaNN, 2 indexes"]
    assert both.bytes_disk == 2 * mined.bytes_disk
    exact = hosts(with_settings(paper, {**negatives, "search.backend": "exact"}))
    assert exact.keys() == rows.keys()
    results = hosts(with_settings(paper, {"search.evaluation": "index"}))
    assert "ScaNN, 3 indexes" in results
    plain = hosts(with_settings(paper, {"evaluation.systems": ("expandr",)}))
    assert "BM25's index" not in plain
    shown = {"evaluation.systems": ("expandr",), "expansion.strategy": "lamer"}
    assert "BM25's index" in hosts(with_settings(paper, shown))


def test_what_lies_beside_for_a_while_is_counted(paper):
    rows, alone = hosts(paper), hosts(paper, count=1)
    # A file of the vectors that each process encoded, until they are one.
    assert rows["corpus, encoded 3 times"].bytes_scratch == 8_841_823 * 768 * 4
    assert alone["corpus, encoded 3 times"].bytes_scratch == 0
    small = hosts(with_settings(paper, {"retriever.vectors": "int8"}))["corpus, encoded 3 times"]
    assert small.bytes_scratch == 8_841_823 * 768 * 4 > small.bytes_disk
    # A query, its expansion, its document and a negative, in each process's temporary files.
    examples = 637_866 * (4 * (512 * 4 + STORED_TEXT) + STORED_EXAMPLE)
    assert rows["step A, 2 trainings"].bytes_scratch == examples
    assert rows["candidates"].bytes_scratch == rows["candidates"].bytes_disk
    # One process puts together what all have sampled.
    assert rows["candidates"].seconds == alone["candidates"].seconds


def test_processes_that_make_batches_have_some_each(paper):
    step = "step A, 2 trainings"
    made = hosts(with_settings(paper, {"mesh.workers": 3}))[step].bytes_memory
    batches = 2 * 1024 * 4 * 512 * 8 / 2  # Two, of a half of their rows.
    assert made - hosts(paper)[step].bytes_memory == 3 * (WORKER + batches)


def test_a_pair_takes_what_is_planned_for_it(paper, tmp_path):
    """Its texts and tokens lie on disk: 8 kB were held of each in every process."""
    generator, _ = load_generator("configs/tiny/tiny-llama")
    limits = dataclasses.replace(paper.dpo, prompt_length=100, response_length=400)
    objective, peaks, counts = OBJECTIVES["sigmoid"], [], (20, 120)
    row = {name: f"{name} axis " * 300 for name in ("prompt", "chosen", "rejected")}
    row |= {"query_id": "q", "reward_chosen": 0.5, "reward_rejected": 0.25}
    reporter = Reporter(Console(quiet=True))
    objective.tokenize(generator, [row], limits)
    for count in counts:
        path = tmp_path / f"{count}.jsonl"
        write_jsonl(path, (row for _ in range(count)))
        gc.collect()
        tracemalloc.start()
        rows, _ = objective.read(path, generator, limits, None, 0.0, own=True)
        dev, others = hold_out(rows, 0.1, objective.prompt)
        pairs = make_examples(objective, generator, dev, others, limits, reporter)[1]
        gc.collect()
        peaks.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert pairs[0].tokens == pairs[len(pairs) - 1].tokens == 900
        assert rows[count - 1] == row
    held = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    planned = hosts(with_settings(paper, {"dpo.prompt_length": 100, "dpo.response_length": 400}))
    none = dataclasses.replace(PAPER_COUNTS, generator_train=0)
    without = hosts(with_settings(paper, {"dpo.response_length": 400}), none)
    training = "step B's training"
    each = planned[training].bytes_memory - without[training].bytes_memory
    always = planned["export"].bytes_memory - without["export"].bytes_memory
    assert held < (each - always) / PAPER_COUNTS.generator_train <= 1000
    assert planned[training].bytes_scratch / PAPER_COUNTS.generator_train > 900 * 4


def test_a_distilled_query_takes_what_is_planned_for_it(paper, tmp_path, monkeypatch):
    """As each process has it: it had its tokens in a list, 36 bytes each."""
    monkeypatch.setattr(distilled, "_generate", lambda *_: None)
    encoder = TextEncoder(load_retriever("configs/tiny/tiny-bert")[0], make_mesh())
    data = TrainingData(Collection("toy", {}, {}, {}), [], [])
    sampler = types.SimpleNamespace(reporter=Reporter(Console(quiet=True)))
    expander, counts, held = types.SimpleNamespace(sampler=sampler), (64, 64, 464), []
    settings = {"distill.epochs": 1.0, "distill.control": True, "retriever.query_length": 32}
    small = with_settings(paper, {**settings, "dpo.prompt_length": 24})
    encoder.tokenize(["axis"], "query")
    (tmp_path / "distilled").mkdir()
    for count in counts:
        rows = (
            {"query_id": f"d2q/{n:07}/0", "document_id": f"{n:07}", "left_out": "",
             "query": f"{n:04} axis of " * 5}
            for n in range(count)
        )  # fmt: skip
        write_jsonl(tmp_path / distilled.GENERATED, rows)
        gc.collect()
        tracemalloc.start()
        queries = distilled._queries(small, data, expander, tmp_path)
        tokens = query_tokens(encoder, [*queries.texts.values()], lambda _: None)
        positives = [[hash(document) for document in of] for of in queries.relevant]
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(queries.texts) == len(tokens) == len(positives) == count
        assert tokens[0].tolist() == encoder.tokenize([queries.texts["d2q/0000000/0"]], "query")[0]
        assert len(tokens[0]) > 18
    each = (held[2] - held[1]) / 400  # The first time libraries fill caches of theirs.
    rows = [hosts(with_settings(small, {"distill.documents": n})) for n in (1000, 2000)]
    name = "distillation, 2 towers"
    planned = (rows[1][name].bytes_memory - rows[0][name].bytes_memory) / 1000
    assert each < planned < 2 * each


def test_towers_are_counted(paper):
    settings = {"distill.epochs": 1.0, "distill.documents": 10_000, "distill.samples": (4,)}
    once, rows = hosts(paper), hosts(with_settings(paper, settings))
    taught = 637_866 + 100_000 + 10_000
    texts = 4 * (taught + PAPER_COUNTS.dev)  # The evaluation samples fewer of a dev query.
    assert rows["expansions to distill"].bytes_disk == texts * (512 * TOKEN_BYTES + LINE)
    assert rows["queries of documents"].bytes_disk == 10_000 * (512 * TOKEN_BYTES + LINE)
    assert rows["the teacher's vectors"].bytes_disk == taught * 768 * 4
    tower = 0.223e9 * 4
    saved = 3 * (paper.keep + 1) * tower
    assert rows["distillation, 1 tower"].bytes_disk == pytest.approx(saved, rel=0.01)
    ranked = with_settings(paper, {**settings, "distill.kl_weight": 1.0, "distill.control": True})
    both = hosts(ranked)["distillation, 2 towers"]
    assert both.bytes_disk == pytest.approx(2 * saved + taught * 16 * 4, rel=0.01)
    # What is exported, kept and ranked as well.
    added = rows["export"].bytes_disk - once["export"].bytes_disk
    assert added == pytest.approx(tower, rel=0.01)
    added = rows["models"].bytes_memory - once["models"].bytes_memory
    assert added == pytest.approx(tower, rel=0.01)
    assert rows["evaluation"].files == once["evaluation"].files + 1
    some = {**settings, "distill.train_queries": 1000, "distill.documents": 0}
    few = hosts(with_settings(paper, some))
    assert few["the teacher's vectors"].bytes_disk == 1000 * 768 * 4
    assert "queries of documents" not in few


def test_further_tests_are_counted(paper):
    paths = paper.data.tests
    numbers = "8841823", *14 * ("1786298",)
    tests = counts_of_tests(paths, numbers, PAPER_COUNTS)
    assert len(tests) == 15
    documents = sum(test.documents for test in tests)
    assert documents == pytest.approx(33.85e6, rel=1e-3)  # As docs/paper.md has it.
    once, rows = hosts(paper), hosts(paper, tests=tests)
    assert rows.keys() - once.keys() == {"15 further tests"}
    row = rows["15 further tests"]
    # Three retrievers' vectors, the store and BM25's index stay, beside what is sampled and ranked.
    stays = documents * (3 * 768 * 4 + 512 * TOKEN_BYTES + TERMS * 8)
    queries = sum(test.test for test in tests)
    written = 2 * 2 * queries * (512 * TOKEN_BYTES + LINE)  # By both generators, in two files.
    assert row.bytes_disk == pytest.approx(stays + written, rel=0.01)
    assert row.seconds > 3 * once["corpus, encoded 3 times"].seconds
    assert row.bytes_memory < 1.1 * max(r.bytes_memory for r in once.values())
    assert row.bytes_network > 3 * documents * 768 * 4 / 2
    apart = hosts(paper, tests=tests[:1])["1 further test"].bytes_disk
    apart += hosts(paper, tests=tests[1:])["14 further tests"].bytes_disk
    assert row.bytes_disk == pytest.approx(apart)


def test_documents_of_further_tests_can_be_told():
    untold = counts_of_tests(("a/scifact.zip", "b"), (), PAPER_COUNTS)
    assert [(t.documents, t.test) for t in untold] == 2 * [(8_841_823, 1000)]
    told = counts_of_tests(("a/scifact", "b"), ("10", "20"), PAPER_COUNTS)
    assert [(t.documents, t.test) for t in told] == [(10, 1000), (20, 1000)]
    all_alike = counts_of_tests(("a", "b"), ("10",), PAPER_COUNTS)
    assert [t.documents for t in all_alike] == [10, 10]
    assert counts_of_tests((), (), PAPER_COUNTS) == []
    for wrong in (("10", "20", "30"), ("0",), ("10", "some")):
        with pytest.raises(UserError, match=r"each of data\.tests, of which there are 2"):
            counts_of_tests(("a", "b"), wrong, PAPER_COUNTS)
    with pytest.raises(UserError, match=r"of which there are 0"):
        counts_of_tests((), ("10",), PAPER_COUNTS)


def test_saved_indexes_are_as_large_as_planned(paper, tmp_path):
    rng, count = np.random.default_rng(0), 400
    texts = [" ".join(f"w{n}" for n in rng.permutation(1000)[:TERMS]) for _ in range(count)]
    Bm25Index(texts).save(tmp_path / "words")
    counts = dataclasses.replace(PAPER_COUNTS, documents=count)
    planned = {"words": hosts(paper, counts)["BM25's index"].bytes_disk}
    if scann.installed():
        changes = {"mining.per_query": 4, "search.scann.method": "ah"}
        vectors = rng.standard_normal((count, 768)).astype(np.float32)
        ScannIndex(vectors, ScannOptions(method="ah")).save(tmp_path / "vectors")
        rows = hosts(with_settings(paper, changes), counts)
        planned["vectors"] = rows["ScaNN, 1 index"].bytes_disk
    for name, size in planned.items():
        saved = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        assert size == pytest.approx(saved, rel=0.15), name


def test_files_of_a_run_are_as_large_as_planned(smoke):
    workdir, _ = smoke
    config = read_config(smoke_config.get_config())
    documents = (workdir / "data" / "corpus.jsonl").read_text().count("\n")
    files = [*(workdir / "work" / "vectors").glob("*.npy")]
    counts = Counts(documents, 32, 8, 8, 16)
    rows = {r.stage: r for r in host_rows(config, counts, machine(), 8 * GIB)}
    planned = rows[f"corpus, encoded {len(files)} times"].bytes_disk
    assert planned == sum(np.load(path, mmap_mode="r").nbytes for path in files)
    assert len([*(workdir / "runs").iterdir()]) + 6 == rows["evaluation"].files
    exported = sum(p.stat().st_size for p in (workdir / "export").rglob("*.safetensors"))
    assert 0.8 < rows["export"].bytes_disk / exported < 1.2


def test_hosts_that_are_too_small_are_named(paper):
    rows = hosts(paper, memory=16 * GIB)
    made = [{**dataclasses.asdict(row), "fits": row.fits} for row in rows.values()]
    lines = plan_misfits({"rows": [], "hosts": made})
    assert any(line.startswith("step A, 2 trainings: a process needs ") for line in lines)
    assert "of its host's 16; try hosts with more memory" in lines[0]
    show_hosts(made, QUIET)
    assert not plan_misfits({"rows": [], "hosts": [{**made[0], "fits": True}]}, 4096 * GIB)
    (line,) = plan_misfits({"rows": [], "hosts": [{**made[0], "fits": True}]}, GIB)
    assert line.startswith("disk: a run needs ")
    assert " GiB at one time, of 1; try less" in line
    # The most is not all that is left, but that of the stage where least room is.
    left = [
        {"bytes_disk": 5, "bytes_scratch": 0},
        {"bytes_disk": 1, "bytes_scratch": 9},
        {"bytes_disk": 2, "bytes_scratch": 1},
    ]
    assert most_disk(left) == 15
