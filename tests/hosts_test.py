"""What a plan says of the hosts, against numbers counted by hand and files of a real run."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import llama3_8b_anchordr
from configs import smoke as smoke_config
from expandr_jax.config import read_config, with_settings
from expandr_jax.planning.hosts import (
    CORE_SECONDS,
    DOCUMENT_BYTES,
    ENTRY,
    INDEX,
    LINE,
    TOKEN_BYTES,
    host_rows,
    show_hosts,
)
from expandr_jax.planning.synthetic import Counts
from expandr_jax.planning.topology import Topology
from expandr_jax.runtime.chips import GIB
from tests.eight_devices import CHIP, QUIET, machine
from train.counts import PAPER_COUNTS
from train.plan import misfits

TWICE = Counts(*(2 * number for number in dataclasses.astuple(PAPER_COUNTS)))


@pytest.fixture(scope="module")
def paper():
    return read_config(llama3_8b_anchordr.get_config())


def hosts(config, counts=PAPER_COUNTS, count=2, memory=192 * GIB):
    devices = jax.devices("cpu")[:8]
    topology = Topology("hosts", devices, CHIP, devices[: 8 // count])
    return {row.stage: row for row in host_rows(config, counts, topology, memory)}


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
    lines = misfits({"rows": [], "hosts": made})
    assert any(line.startswith("step A, 2 trainings: a process needs ") for line in lines)
    assert "of its host's 16; try hosts with more memory" in lines[0]
    show_hosts(made, QUIET)
