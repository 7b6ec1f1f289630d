"""A warm start: the generator learns what relevant documents begin with, before step B."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from configs import base
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.objectives.warm_start import WARM_START, positive_rows
from expandr_jax.weights.hf import load_generator
from tests.commands import finish, start, step_metrics


def test_a_beginning_is_left_open_and_a_whole_text_ends():
    kind = {"dtype": jnp.float32, "compute_dtype": jnp.float32}
    generator, _ = load_generator("configs/tiny/tiny-llama", **kind)
    text = "A list of the names in the module."
    (ids,) = generator.token_ids([text])
    settings = read_config(base.get_config()).dpo
    rows = [{"query_id": "a", "prompt": "Write: ", "response": text}]
    for length, expected in (
        (5, ids[:5]), (len(ids), ids), (len(ids) + 1, [*ids, generator.end_id])
    ):  # fmt: skip
        limits = dataclasses.replace(settings, response_length=length)
        (example,), cut = WARM_START.tokenize(generator, rows, limits)
        assert [*example.responses[0]] == expected
        assert example.extras == {"weight": 1.0}
        assert not cut


def test_each_relevant_document_of_a_query_is_learned_from():
    corpus = {"a": "Stars shine.", "b": "The earth rotates.", "c": "Cats purr."}
    qrels = {"train": {"sky": {"b": 1, "a": 2, "c": 0}, "pets": {"c": 1}, "others": {"a": 1}}}
    collection = Collection("facts", corpus, dict.fromkeys(qrels["train"], "?"), qrels)
    data = TrainingData(collection, ["others"], ["sky", "pets"])
    rows = positive_rows(data, {"sky": "Why?", "pets": "Who?"}, "<{}>".format)
    assert [(row["query_id"], row["prompt"], row["response"]) for row in rows] == [
        ("sky", "<Why?>", "Stars shine."),
        ("sky", "<Why?>", "The earth rotates."),
        ("pets", "<Who?>", "Cats purr."),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train.joint", "train.policy"])
def test_training_begins_with_it(tmp_path, module):
    grpo = (
        "step_b=grpo",
        "grpo.queries=8",
        "grpo.samples=4",
        "grpo.steps=2",
        "grpo.max_new_tokens=8",
    )
    settings = ["warm_start=positives", "expansion.max_new_tokens=12"]
    settings += grpo if module == "train.policy" else []
    overrides = [f"--config.{setting}" for setting in settings]
    output = finish(start(tmp_path / "run", *overrides, module=module))
    assert "warm start" in output
    steps = [row for row in step_metrics(tmp_path / "run") if row["phase"] == "warm-start"]
    assert [row["step"] for row in steps] == [*range(4)]  # Eight queries, two at a time.
    assert steps[-1]["loss"] < steps[0]["loss"]
    if module == "train.policy":
        first = next(row for row in step_metrics(tmp_path / "run") if row["phase"] == "GRPO")
        assert first["kl"] > 1e-6  # It is not the base any more.
    else:
        timings = json.loads((tmp_path / "run" / "timings.json").read_text())
        assert "warm start" in [row["phase"] for row in timings["phases"]]
