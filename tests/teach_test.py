"""`eval.teach`: a generator's scores of passages, which are PyTorch's; restarts; who learns."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval.teach
from configs import retriever, smoke
from eval.teach import teach
from expandr_jax.config import read_config
from expandr_jax.data.triples import read_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, write_jsonl
from expandr_jax.loading import load_generator_model
from expandr_jax.objectives.query_likelihood import (
    LIKELIHOOD_PROMPT,
    LikelihoodSettings,
    QueryLikelihood,
)
from tests.commands import command, error_of
from train.retriever import train_on_triples

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny"
SETTINGS = LikelihoodSettings(prompt_length=256, query_length=24, tokens_per_batch=512)
WORDS = ["array", "gradient", "loss", "norm", "scale", "shape", "step", "count"]
ROWS = [
    {"id": i, "query": f"{a} {b}" * (1 + i % 3), "pos": f"the {b} of {a}",
     "negative": [f"{b} {a} " * n for n in range(1, 1 + i % 4)]}
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    write_jsonl(path, ROWS)
    return path


def config_of(path, **settings):
    config = smoke.get_config()
    config.data.path = str(path)
    config.mesh.update(settings)
    return config


def run(path, workdir, settings=SETTINGS, **mesh):
    return teach(config_of(path, **mesh), workdir, settings, Console(quiet=True))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(path, tmp_path_factory):
    return run(path, tmp_path_factory.mktemp("finished") / "run")


def torch_scores(rows, mean):
    """The score of each passage, from a whole pass over its prompt and the query."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "tiny-llama", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tiny-llama")
    made = []
    for row in rows:
        query = tokenizer(row["query"], add_special_tokens=False)["input_ids"]
        for passage in (row["pos"], *row["negative"]):
            message = LIKELIHOOD_PROMPT.message(document=" ".join(passage.split()))
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
            )
            prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logs = model(torch.tensor([prompt + query])).logits[0].log_softmax(-1)
            own = logs[range(len(prompt) - 1, len(prompt) + len(query) - 1), query]
            made.append(float(own.mean() if mean else own.sum()))
    return made


@pytest.mark.parametrize("mean", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scores_are_the_log_likelihoods_of_transformers(path, mean):
    triples = read_triples(path)[0][:8]
    model = load_generator_model(read_config(config_of(path)))
    likelihood = QueryLikelihood(model, dataclasses.replace(SETTINGS, mean=mean))
    found, cut = likelihood.scores(triples)
    assert [len(scores) for scores in found] == [2 + i % 4 - 1 for i in range(8)]
    flat = np.concatenate(found)
    np.testing.assert_allclose(flat, torch_scores(ROWS[:8], mean), atol=1e-4)
    assert np.ptp(flat) > 1e-3
    assert cut == 0


def test_what_is_too_long_is_cut_at_its_end_and_counted(path):
    model = load_generator_model(read_config(config_of(path)))
    likelihood = QueryLikelihood(model, dataclasses.replace(SETTINGS, query_length=2))
    ((triple, *_), _) = read_triples(path)
    long = dataclasses.replace(triple, positives=("norm " * 2000, "norm " * 4000), negatives=())
    ((first, second),), cut = likelihood.scores([long])
    assert cut == 3  # Both passages and the query.
    assert first == second


def test_the_same_triples_have_scores_and_other_fields_stay(finished):
    rows = rows_of(finished)
    assert [{k: v for k, v in row.items() if k != "teacher_scores"} for row in rows] == ROWS
    triples, _ = read_triples(finished)
    assert all(len(t.teacher_scores) == 1 + len(t.negatives) for t in triples)


@pytest.mark.slow
def test_on_a_mesh_it_says_the_same(path, finished, tmp_path):
    spread = run(path, tmp_path / "run", data=2, fsdp=2, tensor=2)
    for one, other in zip(rows_of(finished), rows_of(spread), strict=True):
        np.testing.assert_allclose(one["teacher_scores"], other["teacher_scores"], atol=1e-4)


class Killed(Exception):
    pass


def test_killed_it_goes_on_and_ends_with_the_same_file(path, finished, tmp_path, monkeypatch):
    """Killed twice, once within a write, of which half is there; blocks have 16 triples here."""
    monkeypatch.setattr(eval.teach, "AT_ONCE", 16)
    whole = run(path, tmp_path / "whole").read_bytes()
    scores = [row["teacher_scores"] for row in rows_of(finished)]
    append, asked = Journal.append, []

    def until_killed(self, rows):
        rows = [*rows]
        if len(self.rows) == 16:
            append(self, rows[:5])
            raise Killed
        append(self, rows)

    monkeypatch.setattr(Journal, "append", until_killed)
    with pytest.raises(Killed):
        run(path, tmp_path / "run")
    monkeypatch.setattr(Journal, "append", append)
    of = QueryLikelihood.scores
    monkeypatch.setattr(
        QueryLikelihood, "scores", lambda *args: (asked.append(len(args[1])), of(*args))[1]
    )
    again = run(path, tmp_path / "run")
    assert again.read_bytes() == whole
    assert sum(asked) == len(ROWS) - 16
    for row, expected in zip(rows_of(again), scores, strict=True):
        np.testing.assert_allclose(row["teacher_scores"], expected, atol=1e-5)
    run(path, tmp_path / "run")  # All is done: nothing is scored.
    assert sum(asked) == len(ROWS) - 16


def test_another_file_or_another_score_is_refused(path, finished, tmp_path):
    workdir = tmp_path / "run"
    other = tmp_path / "triples.jsonl"
    other.write_bytes(path.read_bytes())
    run(other, workdir)
    with pytest.raises(UserError, match="mean was True when this run began, now False"):
        run(other, workdir, dataclasses.replace(SETTINGS, mean=False))
    write_jsonl(other, ROWS[:-1])
    with pytest.raises(UserError, match=r"sha256 was .* when this run began"):
        run(other, workdir)


@pytest.mark.slow
def test_mistakes_are_one_line_before_any_model_is_loaded(tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_text('{"query": "a", "pos": "b"}\n{"query": "a", "pos": 3}\n')
    output, _ = (process := command(
        "eval.teach", "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={path}",
    )).communicate(timeout=120)  # fmt: skip
    assert process.returncode == 2
    assert f"error: {path}:2: " in error_of(output)
    assert "model" not in output


@pytest.mark.slow
def test_step_a_learns_what_it_wrote(finished, tmp_path):
    config = retriever.get_config()
    config.data.path = str(finished)
    config.retriever.source, config.retriever.sha256 = str(TINY / "tiny-bert"), None
    config.retriever.max_length = 16
    config.contrastive.update(
        {"batch_size": 8, "epochs": 30.0, "learning_rate": 3e-3, "negatives": 3, "kl_weight": 1.0,
         "info_nce_weight": 0.0, "warmup_steps": 0, "temperature": 1.0, "teacher_temperature": 0.1}
    )  # fmt: skip
    train_on_triples(config, tmp_path / "run", Console(quiet=True))
    lines = rows_of(tmp_path / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
