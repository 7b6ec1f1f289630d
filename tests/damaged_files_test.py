"""Files that are damaged, cut or exchanged, of blocks, orders, margins and the last turn.

What others give is refused in one line that names it, or read; what a run has made is made again.
"""

import functools
import json
import random
import shutil

import jax
import pytest

from eval import tiny_models
from expandr_jax.config import read_config
from expandr_jax.data.triples import read_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, write_jsonl
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.weights.adapter import export_adapter
from expandr_jax.weights.export import export_retriever
from expandr_jax.weights.hf import load_generator, load_retriever
from tests.beir_test import mutate
from tests.commands import command, error_of
from tests.llm_ql_test import TINY_LLAMA
from tests.mutations_test import check_complaint, complaint_of, refused_mutations, spoil_json
from tests.orders_test import QUIET, small, write_triples
from tests.retriever_training_test import TINY
from train.generator import read_rows
from train.orders import make_orders

BLOCK_FILES = ("config.json", "modules.json", "1_Pooling/config.json", "tokenizer_config.json",
               "sentence_bert_config.json", "model.safetensors")  # fmt: skip


def blocks(directory):
    options = {"pooling": "block", "normalize": False, "max_length": 128, "with_head": True}
    export_retriever(directory, *load_retriever(TINY_LLAMA, **options))
    return directory


@functools.cache
def generator():
    return load_generator(TINY_LLAMA)[0]


def orders(directory):
    triples = write_triples(directory / "triples.jsonl")
    make_orders(small(), triples, directory / "orders.jsonl", QUIET)
    return directory / "orders.jsonl"


def turn(directory):
    """As a run writes its last turn's triples."""
    rows = [
        {"query_id": f"q{i}", "aim": aim, "query": f"query {i}", "pos": [f"good {i} {aim}"],
         "neg": [f"bad {i}"], "margin": i / 8 - 1}
        for i in range(8)
        for aim in ("relevance", "completeness", "purity", "judged")
    ]  # fmt: skip
    write_jsonl(directory / "figret.jsonl", rows)
    return directory / "figret.jsonl"


def read_orders(path, step_b):
    config = small()
    config.step_b = step_b
    objective = OBJECTIVES["reward-sft" if step_b != "dpo" else "sigmoid"]
    return read_rows(objective, read_config(config), path, generator(), own=False)


# What is read -> its file, its reader, and the least number of 200 changes that are refused.
GIVEN = {
    "orders as pairs": (orders, functools.partial(read_orders, step_b="dpo"), 100),
    "orders as candidates": (orders, functools.partial(read_orders, step_b="reward-sft"), 100),
    "triples with margins": (turn, lambda path: read_triples(path)[0], 80),
}


@pytest.mark.parametrize(
    "kind",
    ["triples with margins"]
    + [
        pytest.param(f"orders as {rows}", marks=pytest.mark.slow)
        for rows in ("pairs", "candidates")
    ],
)
def test_a_spoilt_file_that_is_given_ends_in_one_line_or_is_read(tmp_path, kind):
    make, read, least = GIVEN[kind]
    path = make(tmp_path)
    data, rng, refused = path.read_bytes(), random.Random(kind), 0
    assert read(path)
    for number in range(200):
        path.write_bytes((spoil_json if number % 2 else mutate)(data, rng))
        try:
            read(path)
        except UserError as error:
            refused += 1
            check_complaint(str(error), path)
    assert refused > least, refused


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    made, given = orders(tmp_path), turn(tmp_path)
    for step_b in ("dpo", "reward-sft"):
        assert ":1: " in complaint_of(lambda kind=step_b: read_orders(given, kind), given)
    assert ":1: " in complaint_of(lambda: read_triples(made), made)
    for path, read in ((made, lambda: read_orders(made, "dpo")),
                       (given, lambda: read_triples(given))):  # fmt: skip
        path.write_bytes(path.read_bytes()[:-20])  # Cut within its last line.
        assert f":{len(path.read_bytes().splitlines())}: " in complaint_of(read, path)


@pytest.mark.slow
def test_whatever_is_done_to_a_turn_s_files_they_are_made_again(tmp_path):
    """Damaged, cut, exchanged and removed: none is taken for whole, and each is named once."""
    place, work = tmp_path / "round-0", tmp_path / "work" / "round-0"
    place.mkdir()
    work.mkdir(parents=True)
    files = [turn(place), shutil.copy(turn(tmp_path), work / "figret-failed.jsonl")]
    names = [str(path.relative_to(tmp_path)) for path in files]
    said, rng = [], random.Random(0)
    checksums = Checksums(tmp_path, said.append)
    write_jsonl(files[1], [{"query_id": "q0"}])
    kept = [path.read_bytes() for path in files]
    for number in range(200):
        for path, data in zip(files, kept, strict=True):
            path.write_bytes(data)
        checksums.record(*names)
        assert checksums.intact(*names)
        which = number % 2
        changed = mutate(kept[which], rng) if number > 4 else kept[1 - which]
        if changed == kept[which]:
            continue
        files[which].write_bytes(changed)
        assert not Checksums(tmp_path, said.append).intact(names[which])
        assert not files[which].exists()
        assert f"{names[which]}: is damaged or was removed; it is made again" in said[-1]
        assert Checksums(tmp_path, said.append).intact(names[1 - which])


def test_a_journal_of_a_turn_s_texts_keeps_what_is_whole(tmp_path):
    rows = [{"query_id": f"q{i}", "sample": i % 3, "text": f"text {i}"} for i in range(9)]
    path = tmp_path / "figret-texts.jsonl"
    journal = Journal(path)
    journal.append(rows)
    journal.finish()
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        path.write_bytes(mutate(data, rng))
        again = Journal(path)
        found = [{name: row[name] for name in rows[0]} for row in again.rows]
        assert found == rows[: len(found)]
        assert again.finished == (path.exists() and path.read_bytes() == data)
        path.with_name(f"{path.name}.part").unlink(missing_ok=True)


@pytest.mark.slow
def test_spoilt_files_of_a_block_directory_end_in_one_line_or_load(tmp_path):
    directory = blocks(tmp_path / "blocks")
    names = [name for name in BLOCK_FILES if (directory / name).exists()]
    assert {"1_Pooling/config.json", "model.safetensors"} <= {*names}
    assert refused_mutations(directory, names, load_retriever) > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_block_directory_with_another_model_s_file_is_refused(tmp_path, name):
    """The file is of the model that it was made of, whose table has no rows for the blocks."""
    directory = blocks(tmp_path / "blocks")
    data = (directory / name).read_bytes()
    shutil.copy(f"{TINY_LLAMA}/{name}", directory / name)
    complaint_of(lambda: load_retriever(str(directory)), directory)
    (directory / name).write_bytes(data[: len(data) // 2])
    complaint_of(lambda: load_retriever(str(directory)), directory)
    (directory / name).unlink()
    complaint_of(lambda: load_retriever(str(directory)), directory)


DECODER = (
    "train.retriever", "--config=configs/decoder.py", "--config.retriever.sha256=",
    f"--config.retriever.source={TINY_LLAMA}", "--config.contrastive.micro_batch=0",
)  # fmt: skip
BLOCKS = (*DECODER, "--config.retriever.pooling=block", "--config.llara.epochs=1")
QUERIES = (*DECODER, "--config.contrastive.query_likelihood_weight=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*QUERIES, "--config.retriever.pooling=mean"),
         "contrastive.query_likelihood_weight is above 0, which is for causal decoders"),
        ((*QUERIES, "--config.contrastive.query_likelihood_corruption=1.5"),
         "contrastive.query_likelihood_corruption is 1.5; expected"),
        ((*BLOCKS, "--config.retriever.pooling=last"),
         "llara.epochs is 1.0, but the retriever's pooling is 'last'"),
        ((*BLOCKS, "--config.contrastive.batch_size=16"),
         "pairs of passages do not fill one batch of 16"),
        (("train.joint", "--config=configs/smoke.py", "--config.llara.epochs=1"),
         "llara.epochs is above 0, for train.retriever alone"),
    ],
)  # fmt: skip
def test_wrong_settings_end_a_program_with_two_and_a_line(tmp_path, arguments, message):
    rows = [{"query": f"q {i}", "pos": [f"a b {i}" if i < 3 else f"w{i}"]} for i in range(32)]
    write_jsonl(tmp_path / "triples.jsonl", rows)
    workdir = f"--workdir={tmp_path / 'run'}"
    data = () if "joint" in arguments[0] else (f"--config.data.path={tmp_path / 'triples.jsonl'}",)
    process = command(*arguments, *data, workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert message in error_of(output)
    assert not (tmp_path / "run" / "export").exists()
    assert not [*tmp_path.glob("run/checkpoints/*/[0-9]*")]


def test_a_record_of_files_that_is_damaged_vouches_for_none(tmp_path):
    path = turn(tmp_path)
    Checksums(tmp_path, print).record(path.name)
    seals = tmp_path / "work" / "seals.json"
    record, said = json.loads(seals.read_text()), []
    record["files"][path.name] = "0" * 64
    seals.write_text(json.dumps(record))
    assert not Checksums(tmp_path, said.append).intact(path.name)
    assert "is damaged; finished files are made again" in said[0]


SENTENCE_FILES = (
    "modules.json", "config.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "3_Dense/config.json", "model.safetensors", "tokenizer_config.json",
)  # fmt: skip


@pytest.mark.slow
def test_spoilt_files_of_a_decoder_with_layers_after_pooling_end_in_one_line_or_load(tmp_path):
    tiny_models.save_sentences(tmp_path / "gemma", "embedding-gemma")
    assert all((tmp_path / "gemma" / name).exists() for name in SENTENCE_FILES)
    assert refused_mutations(tmp_path / "gemma", SENTENCE_FILES, load_retriever) > 60


@pytest.mark.slow
def test_spoilt_files_of_a_retriever_s_adapter_end_in_one_line_or_load(tmp_path):
    """Its base is a directory beside it, whose name stands in it, too."""
    lora, directory = LoraConfig(2, 4.0, 0.0, ("_proj$",)), tmp_path / "adapter"
    shutil.copytree(TINY, tmp_path / "base")
    retriever, params = load_retriever(TINY)
    adapter = init_lora(jax.random.key(0), params, lora)
    config = retriever.module.config
    export_adapter(directory, adapter, lora, config, str(tmp_path / "base"), generates=False)
    names, said = ("adapter_config.json", "adapter_model.safetensors"), []
    for name in names:
        data, rng = (directory / name).read_bytes(), random.Random(name)
        for _ in range(100):
            (directory / name).write_bytes(mutate(data[:3000], rng) + data[3000:])
            try:
                load_retriever(str(directory), pooling="mean", normalize=True)
            except UserError as error:
                said.append(str(error))
        (directory / name).write_bytes(data)
    assert len(said) > 100, len(said)
    assert not [complaint for complaint in said if len(complaint.splitlines()) != 1]
