"""train.rehearse: its collection and models, what it measures, its verdicts and exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from configs import llama3_8b_anchordr, smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import read_beir
from expandr_jax.errors import UserError
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request
from expandr_jax.planning.narrow import count_words, write_narrow_generator, write_narrow_retriever
from expandr_jax.planning.synthetic import Counts, draw_words, write_collection
from expandr_jax.planning.usage import MEASURES, show_usage, usage_misfits, usage_rows
from expandr_jax.runtime.resources import BETWEEN, START
from expandr_jax.weights.hf import load_generator, load_retriever
from tests.commands import ROOT, command, error_of
from tests.eight_devices import QUIET
from train import rehearse
from train.counts import full_counts
from train.launch import EXIT_DOES_NOT_FIT, output_file

COUNTS = Counts(documents=200, retriever_train=30, generator_train=10, dev=4, test=6)
STAGES = ("data", "models", "retriever, round 0", "rewards, round 0", "evaluation", "export")


@pytest.fixture(scope="module")
def config():
    return read_config(smoke.get_config())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic") / "collection"
    write_collection(directory, COUNTS, words=1000, document=40, query=12)
    return directory


def test_a_collection_has_what_was_asked_for(written):
    found = read_beir(written)
    assert len(found.corpus) == 200
    assert len(found.qrels["train"]) >= 40
    assert (len(found.qrels["dev"]), len(found.qrels["test"])) == (4, 6)
    judged = [grades for split in found.qrels.values() for grades in split.values()]
    assert all(sum(grade > 0 for grade in grades.values()) == 1 for grades in judged)
    assert all(document in found.corpus for grades in judged for document in grades)
    assert sum(0 in grades.values() for grades in found.qrels["train"].values()) >= 40
    lengths = [len(text.split()) for text in found.corpus.values()]
    assert max(lengths) == 40
    assert np.mean(lengths) > 30
    assert len(set(lengths)) > 10


def test_the_same_collection_is_the_same(written, tmp_path):
    write_collection(tmp_path / "again", COUNTS, words=1000, document=40, query=12)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()


def test_words_are_as_frequent_as_those_of_a_language():
    counts = np.bincount(draw_words(np.random.default_rng(0), 10_000, 10**6), minlength=10_000)
    # Zipf's: the hundredth is a hundredth as frequent as the first.
    assert 60 < counts[0] / counts[95:105].mean() < 170
    assert (counts > 0).mean() > 0.9


def test_a_share_of_the_counts_is_one_at_least():
    assert COUNTS.at(0.1) == Counts(20, 3, 1, 1, 1)


def test_models_have_the_vocabulary_and_the_width_of_the_config(config, tmp_path):
    write_narrow_retriever(tmp_path / "retriever", config)
    retriever, params = load_retriever(str(tmp_path / "retriever"), max_length=16)
    assert retriever.module.config.vocab_size == 300
    assert params["dense"]["kernel"].shape[1] == 32
    # A passage is one word to the generator, and as long as its limit to the retriever.
    (ids,) = retriever.token_ids(["w1 w2-w3-w4"])
    assert len(ids) == 6
    assert len(set(ids)) == 6
    assert count_words(config) == 296


def test_the_generator_writes_a_passage_and_ends(config, tmp_path):
    write_narrow_generator(tmp_path / "generator", config)
    generator, params = load_generator(str(tmp_path / "generator"))
    assert generator.module.config.vocab_size == 400
    ids, _ = generator.chat_ids("Write a passage that answers w1 w2 w3", 96)
    engine = Engine(
        generator.module, params, slots=4, prompt_buckets=(96,), max_new_tokens=8,
        eos_ids=generator.eos_ids, pad_id=generator.pad_id, seed=0,
    )  # fmt: skip
    requests = [Request("q", i, tuple(ids), 1.0, top_p=0.9, max_new_tokens=8) for i in range(12)]
    texts = [generator.decode(one.tokens) for one in engine.generate(requests)]
    assert len(set(texts)) > 6
    for text in texts:
        assert text.count("-") > 4
        (tokens,) = generator.token_ids([text])
        assert len(tokens) == 1


DISKS = "parts", "examples", "after"
MEASURED = """
import pathlib, subprocess, sys, tempfile, time
import numpy as np
from expandr_jax.runtime import resources

workdir, scratch = map(pathlib.Path, sys.argv[1:])
resources.SECONDS_BETWEEN_DISKS, resources.ARRAYS_BETWEEN_BIRTHS = 0.02, 1
resources.start(workdir / "usage.json", scratch)
import jax, jax.numpy as jnp

with resources.stage("outer", workdir):
    with resources.stage("inner", workdir):
        held = np.ones(200 * 2**20, np.uint8)
        time.sleep(0.05)
        del held
    (workdir / "file").write_bytes(bytes(3_000_000))
    time.sleep(0.3)
big = jax.jit(lambda x: jnp.ones(2**20) * x)
with resources.stage("program", workdir):
    big(2.0)
    big(3.0)
with resources.stage("parts", workdir):
    (workdir / "part").write_bytes(bytes(2_000_000))
    time.sleep(0.2)
    (workdir / "part").unlink()
with resources.stage("examples", workdir), tempfile.TemporaryFile(dir=scratch) as file:
    file.write(bytes(4_000_000))
    (scratch / "named").write_bytes(bytes(500_000))
    time.sleep(0.2)
    (scratch / "named").unlink()
with resources.stage("after", workdir):
    pass
child = "held = b'x' * 150 * 2**20; print(len(held), flush=True); input()"
with resources.stage("children", workdir):
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-Sc", child], **pipes)
    other.stdout.readline()
    time.sleep(0.5)
    other.communicate(b"\\n")
"""


def test_each_stage_has_what_was_its_own(tmp_path):
    places = tmp_path / "run", tmp_path / "scratch"
    for place in places:
        place.mkdir()
    subprocess.run([sys.executable, "-c", MEASURED, *map(str, places)], cwd=ROOT, check=True)
    found = json.loads((places[0] / "usage.json").read_text())
    assert list(found) == [START, "outer", "inner", BETWEEN, "program", *DISKS, "children"]
    start = found[START]["memory_bytes"]
    assert 190 * 2**20 < found["inner"]["memory_bytes"] - start < 260 * 2**20
    assert found["outer"]["memory_bytes"] - start < 100 * 2**20
    assert found["outer"]["disk_bytes"] >= 3_000_000 > found["inner"]["disk_bytes"]
    assert 0.3 <= found["outer"]["seconds"] < 3
    assert found["program"]["device_bytes"] == 4 * 2**20
    assert found["program"]["programs"] >= 1
    assert found["inner"]["programs"] == 0
    assert found["program"]["seconds"] < 0.3  # Compiling and running it took longer.
    children = found["children"]["memory_bytes"] - found["after"]["memory_bytes"]
    assert 150 * 2**20 < children < 200 * 2**20
    # What is gone when a stage ends was there, too; usage.json is a few hundred bytes.
    disk = {stage: used["disk_bytes"] - 3_000_000 for stage, used in found.items()}
    assert 2_000_000 <= disk["parts"] < 2_010_000
    if sys.platform == "linux":
        assert 4_500_000 <= disk["examples"] < 4_510_000
    assert 0 <= disk["after"] < 10_000


def test_counts_are_what_is_given_then_the_limits_then_the_papers(config):
    counts = full_counts(config, {"documents": 5000, "dev": None})
    assert counts == Counts(5000, 32, 8, 8, 16)
    paper = full_counts(read_config(llama3_8b_anchordr.get_config()), {})
    assert paper == Counts(8_841_823, 637_866, 100_000, 1000, 1000)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((0.1, 0.2), "expected 3 or more, rising"),
        ((0.1, 0.3, 0.2), "expected 3 or more, rising"),
        ((-1, 1, 2), "expected a share above 0"),
        ((0.1, 1, 2), "that is 3 of 32 retriever_train, and a stage needs 8; expected 0.25"),
    ],
)
def test_scales_that_say_nothing_are_refused(config, scales, message):
    with pytest.raises(UserError, match=message):
        rehearse.check_counts(config, Counts(5000, 32, 80, 80, 80), scales)


def test_on_policy_steps_are_few_and_their_queries_are_there(config, tmp_path):
    config = with_settings(config, {"step_b": "grpo", "grpo.queries": 16})
    with pytest.raises(UserError, match="that is 8 of 80 generator_train, and a stage needs 16"):
        rehearse.check_counts(config, Counts(5000, 320, 80, 80, 80), (0.1, 0.2, 0.3))
    changes = rehearse._changes(config, COUNTS, tmp_path, tmp_path)
    assert changes["grpo.steps"] == 3 < changes["grpo.watch_steps"]
    assert config.contrastive.epochs == config.dpo.epochs == 2.0
    assert changes["contrastive.epochs"] == changes["dpo.epochs"] == 1.0
    with_settings(config, changes)  # They are settings that there are.


def test_the_parts_of_an_on_policy_step_are_stages(tmp_path):
    lines = [
        {"phase": "contrastive", "step": 0, "step_seconds": 9.0},
        *({"phase": "GRPO", "step": i, "sampling_seconds": s, "update_seconds": 2 * s}
          for i, s in enumerate((50.0, 1.0, 3.0))),
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = rehearse.parts_of_a_step(path, "GRPO")
    assert found == {
        "GRPO, a step's sampling": {"seconds": 2.0},
        "GRPO, a step's update": {"seconds": 4.0},
    }
    rows = usage_rows((0.1, 0.2, 0.3), [[found]] * 3, {})
    assert not usage_misfits(rows)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:1]))
    assert rehearse.parts_of_a_step(path, "GRPO") == {}


def test_a_reranker_is_refused(config, tmp_path):
    config = with_settings(config, {"evaluation.systems": ("rerank:expandr",)})
    with pytest.raises(UserError, match="rerank:expandr reads documents again"):
        rehearse.rehearse(config, COUNTS, (1, 2, 3), 1, {}, QUIET, tmp_path)


def test_a_scale_that_is_no_number_is_refused_in_one_line():
    process = command("train.rehearse", "--config=configs/smoke.py", "--scale=much")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error_of(output) == "error: --scale=much: expected numbers"


def test_a_directory_is_no_file_for_what_was_found(tmp_path):
    with pytest.raises(UserError, match=r"is a directory; expected the name of a file"):
        output_file(str(tmp_path))
    with pytest.raises(UserError, match=r"there is no directory"):
        output_file(str(tmp_path / "absent" / "out.json"))
    assert output_file(str(tmp_path / "out.json")) == tmp_path / "out.json"


def test_a_process_has_the_devices_that_its_own_meshes_want(config):
    assert rehearse.devices_of_a_process(config) == 1
    paper = read_config(llama3_8b_anchordr.get_config())
    assert rehearse.devices_of_a_process(paper) == 4
    both = with_settings(config, {"mesh.sampling": (2, 1, 2), "mesh.encoding": (-1, 2, 3)})
    assert rehearse.devices_of_a_process(both) == 12


def usage(*values):
    """One process's usage at each scale: memory in bytes of a stage."""
    row = dict.fromkeys(MEASURES, 0)
    return [[{"stage": {**row, "memory_bytes": value}}] for value in values]


def test_what_does_not_fit_is_named_with_why():
    scales, gib = (0.01, 0.03, 0.1), 2**30
    rows = usage_rows(scales, usage(gib, 3 * gib, 10 * gib), {"memory_bytes": 48 * gib})
    assert usage_misfits(rows) == ["stage: memory of a process: 100 GiB at the full counts, of 48"]
    rows = usage_rows(scales, usage(gib, 9 * gib, 100 * gib), {})
    assert usage_misfits(rows) == [
        "stage: memory of a process: grows worse than linearly, to 1e+04 GiB"
    ]
    rows = usage_rows(scales, usage(gib, gib, gib), {"memory_bytes": 48 * gib})
    assert not usage_misfits(rows)
    show_usage(scales, rows, QUIET)
    small = [[{"stage": {**dict.fromkeys(MEASURES, 0), "disk_bytes": gib}}]] * 3
    rows = usage_rows(scales, small, {"disk_bytes": gib / 2})
    assert usage_misfits(rows) == ["stage: disk: 1 GiB at the full counts, of 0.5"]


# With stages of tests/hoarding.py.
WRONG = """
from train import launch, rehearse

rehearse.REHEARSED = "tests.hoarding"
launch.launch(rehearse.main, rehearse.define_flags)
"""
ARGUMENTS = (
    "--config=configs/smoke.py", "--documents=75000", "--retriever_train=800",
    "--generator_train=400", "--dev=200", "--test=200", "--scale=0.02,0.04,0.08",
    "--processes=1", "--host_memory=8",
)  # fmt: skip


@pytest.mark.slow
def test_a_stage_that_holds_all_texts_and_one_that_is_quadratic_are_named(tmp_path):
    out = tmp_path / "rehearsal.json"
    process = subprocess.run(
        [sys.executable, "-c", WRONG, *ARGUMENTS, f"--out={out}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    output = process.stdout
    assert process.returncode == EXIT_DOES_NOT_FIT, process.stderr
    assert "scale 0.08: export" in process.stderr
    assert "memory of a process, GiB of 8" in output
    named = [line for line in output.splitlines() if line.startswith("does not fit: ")]
    assert len(named) == 2, named
    assert named[0].startswith("does not fit: data: memory of a process: ")
    assert named[1].startswith("does not fit: export: memory of a process: grows worse")
    found = json.loads(out.read_text())
    assert found["config"] == "configs/smoke.py"
    assert found["scales"] == [0.02, 0.04, 0.08]
    assert {row["stage"] for row in found["rows"]} >= {START, BETWEEN, *STAGES}
    for row in found["rows"]:
        assert len(row["values"]) == 3
        if row["measure"] == "memory_bytes":
            kinds = {"data": "linear", "export": "worse"}
            assert row["growth"] == kinds.get(row["stage"], row["growth"])
