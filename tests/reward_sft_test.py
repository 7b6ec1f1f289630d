"""Reward-weighted learning of candidates: its loss in numpy, what it learns, and its files."""

import collections
import functools
import gc
import io
import json
import random
import threading
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from configs import smoke
from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl, write_jsonl
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.objectives import objective as objective_module
from expandr_jax.objectives.objective import ObjectiveSettings, adapter_losses
from expandr_jax.objectives.packing import Example, pack
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.objectives.reward_sft import REWARD_SFT, read_rewarded
from expandr_jax.rewards.group import Group
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.weights.hf import load_generator
from tests.commands import ROOT, finish, start
from tests.processes_test import Beside
from train import generator as training
from train import preferences

TINY_LLAMA = ROOT / "configs" / "tiny" / "tiny-llama"
EXAMPLES = [
    Example([5, 6, 7], ([80, 90, 2],), {"weight": 0.5}),
    Example([5, 6, 7], ([100, 2],), {"weight": 1.5}),
    Example([30], ([2],), {"weight": 0.0}),
    Example([9, 9, 3, 40, 41], ([4, 44, 45, 46, 2],), {"weight": 2.0}),
]
losses_of = functools.partial(adapter_losses, objective=REWARD_SFT)


@pytest.fixture(scope="module")
def tiny():
    generator, params = load_generator(str(TINY_LLAMA))
    lora = LoraConfig(rank=2, dropout=0.0)
    return (
        generator,
        generator.module.clone(lora=lora),
        params,
        init_lora(jax.random.key(0), params, lora),
    )


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("chunk", [1, 256])
def test_the_loss_equals_numpy_s_of_transformers_logits(tiny, length_normalized, chunk):
    _, module, params, adapter = tiny
    settings = ObjectiveSettings(length_normalized=length_normalized, chunk=chunk)
    batch = pack(EXAMPLES, pad_id=0)
    losses, metrics = losses_of(adapter, params, batch, module=module, settings=settings)
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA).eval()
    for row, example in enumerate(EXAMPLES):
        prompt, response = example.ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0].double().numpy()
        logits = logits[len(prompt) - 1 : -1]
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        picked = log_probs[np.arange(len(response)), response]
        expected = picked.mean() if length_normalized else picked.sum()
        np.testing.assert_allclose(losses[row], -example.extras["weight"] * expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["log_prob"][row], picked.sum(), rtol=1e-5)


def test_the_mean_over_candidates_is_the_mean_loss_of_queries(tiny):
    """Queries weigh alike, whatever the number of their candidates."""
    generator, module, params, adapter = tiny
    rows = [
        {"prompt": "a?", "candidates": [candidate("array", 1.0), candidate("norm", 0.5)]},
        {"prompt": "b?", "candidates": [candidate(t, 0.1 * i) for i, t in enumerate("xyzuv")]},
        {"prompt": "c?", "candidates": [candidate("", 9.0), candidate("loss", 0.0)]},
    ]
    settings = ObjectiveSettings(reward_temperature=0.5)
    examples, cut = REWARD_SFT.tokenize(
        generator, [Group.from_row(row) for row in rows], limits(settings)
    )
    assert cut == 0
    assert len(examples) == 8
    assert all(example.responses[0][-1] == 2 for example in examples)
    losses, metrics = losses_of(
        adapter, params, pack(examples, 0), module=module, settings=settings
    )
    log_probs = np.asarray(metrics["log_prob"], np.float64)
    queries = []
    for values, part in zip(
        ([1.0, 0.5], [0.0, 0.1, 0.2, 0.3, 0.4], [0.0]), np.split(log_probs, [2, 7]), strict=True
    ):
        weights = np.exp(np.array(values) / 0.5)
        queries.append(-np.sum(weights * part) / weights.sum())
    np.testing.assert_allclose(np.mean(losses), np.mean(queries), rtol=1e-5)


def test_examples_are_named_by_whatever_id_a_line_has(tiny):
    """Messages join the names of a batch's examples."""
    rows = [
        {**id_, "prompt": "a?", "candidates": [candidate("array", 1.0)]}
        for id_ in ({"query_id": "q"}, {"query_id": 7}, {"query_id": 0}, {"query_id": None}, {})
    ]
    examples, _ = REWARD_SFT.tokenize(
        tiny[0], [Group.from_row(row) for row in rows], limits(ObjectiveSettings())
    )
    assert [example.name for example in examples] == ["q", "7", "0", "None", "4"]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["sigmoid", "reward-sft"])
def test_processes_share_the_tokens_and_all_have_what_one_makes(tiny, monkeypatch, kind, count):
    """Each tokenized all of them."""
    monkeypatch.setattr(objective_module, "ROWS_AT_ONCE", 6)
    words, draw = ["array", "norm", "loss", "axis", "shape"], random.Random(0)
    rows = []
    for _ in range(25):
        texts = [" ".join(draw.choices(words, k=draw.randrange(1, 14))) for _ in range(4)]
        group = [candidate(text, draw.random()) for text in texts[: draw.randrange(2, 5)]]
        pair = {"chosen": texts[0], "rejected": texts[1]}
        rows.append({"prompt": f"{texts[2]}?", "candidates": group, **pair})
    objective, settings = OBJECTIVES[kind], limits(ObjectiveSettings())
    if kind == "reward-sft":
        rows = [Group.from_row(row) for row in rows]
    asked, tokens = [], Generator.token_ids

    def counted(self, texts):
        asked.append(threading.get_ident())
        return tokens(self, texts)

    monkeypatch.setattr(Generator, "token_ids", counted)
    alone, cut = objective.tokenize(tiny[0], rows, settings)
    assert cut > 0
    given, barrier = {}, threading.Barrier(count)
    asked.clear()

    def made(index):
        member, told = Beside(index, count, given, barrier), []
        return objective.tokenize(tiny[0], rows, settings, member, told.append), told

    with ThreadPoolExecutor(count) as pool:
        for (examples, lost), told in pool.map(made, range(count)):
            assert [*examples] == [*alone]
            assert [example.name for example in examples] == [example.name for example in alone]
            assert (lost, sum(told)) == (cut, len(rows))
    assert len(asked) == len(rows)
    assert max(collections.Counter(asked).values()) <= len(rows) // count + 3


def limits(settings):
    """The section `dpo`, as far as it is needed."""
    return types.SimpleNamespace(**vars(settings), prompt_length=8, response_length=8)


def candidate(text, reward):
    return {"text": text, "reward": reward}


GOOD, POOR = "axis 1", "a norm"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Candidates by query, as messages or as text, of which one kind is rewarded."""
    path = tmp_path_factory.mktemp("candidates") / "candidates.jsonl"
    rows = []
    for i in range(20):
        candidates = [candidate(f"{GOOD} {i}", 2.0), candidate(f"{POOR} {i}", 0.2)]
        candidates += [candidate("no", 0.0), candidate(" ", 3.0)]
        if i % 2:
            rows.append({"query": f"shape {i}", "candidates": candidates})
        else:
            message = {"role": "user", "content": f"shape {i}?"}
            rows.append({"prompt": [message], "candidates": candidates[::-1]})
    write_jsonl(path, rows)
    return path


def make_config(path, **dpo):
    config = smoke.get_config()
    config.data.kind = "preferences"
    config.data.path = str(path)
    config.expansion.template = "{query}?"
    config.step_b = "reward-sft"
    config.dpo.update(
        prompt_length=64, response_length=16, batch_size=8, dev_share=0.2,
        epochs=6.0, learning_rate=2e-2, save_every=5, eval_every=10, length_normalized=True, **dpo,
    )  # fmt: skip
    return config


def train(config, workdir):
    output = io.StringIO()
    training.train_adapter(config, workdir, Console(file=output, width=200))
    return output.getvalue()


def metrics(workdir, phase):
    return [row for _, row in read_jsonl(workdir / "metrics.jsonl", {}) if row["phase"] == phase]


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, train(make_config(path), workdir)


def test_rewarded_candidates_become_likelier_than_the_others(path, trained):
    from peft import PeftModel

    workdir, output = trained
    assert "20 queries with candidates" in output
    dev = metrics(workdir, "generator-dev")
    assert dev[-1]["loss"] < dev[0]["loss"]
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    tokenizer = load_generator(str(TINY_LLAMA))[0].tokenizer
    model = PeftModel.from_pretrained(base, workdir / "export" / "adapter").eval()

    def gain(text):
        """How much the adapter raises a text's log-probability on a query never trained on."""
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "shape 31?"}], add_generation_prompt=True, tokenize=False
        )
        ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, text)]

        def log_prob():
            with torch.no_grad():
                logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
            return torch.log_softmax(logits, -1)[range(len(ids[1])), ids[1]].sum().item()

        with model.disable_adapter():
            before = log_prob()
        return log_prob() - before

    assert gain(GOOD) > gain(POOR) + 1
    assert gain(GOOD) > 1


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(path, trained, tmp_path, monkeypatch):
    save, calls = Checkpoints.save, []

    def interrupted(self, *arguments):
        save(self, *arguments)
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(Killed):
            train(make_config(path), tmp_path / "run")
    gc.collect()
    train(make_config(path), tmp_path / "run")
    name = "export/adapter/adapter_model.safetensors"
    ours, theirs = (load_file(directory / name) for directory in (tmp_path / "run", trained[0]))
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor], value)


def test_lines_with_nothing_to_learn_are_left_out_and_counted(tiny, path, tmp_path):
    near = {"similarity_positive": 0.3, "similarity_answer": 0.4}
    far = {"similarity_positive": 0.3, "similarity_answer": -0.4}
    two = [candidate("a", 1.0), candidate("b", 0.5)]
    rows = [
        {"query": "kept", "candidates": [{**two[0], **near}, {**two[1], **far}]},
        {"query": "far", "candidates": [{**c, **far} for c in two]},
        {"query": "one text", "candidates": [candidate("a", 1.0), candidate("a ", 0.0)]},
        {"query": "one reward", "candidates": [candidate("a", 1.0), candidate("b", 1.0)]},
        {"query": "empty", "candidates": [candidate("", 1.0), candidate(" ", 0.0)]},
    ]
    file = tmp_path / "candidates.jsonl"
    write_jsonl(file, rows)
    config = make_config(file)
    sections = config.dpo, config.expansion
    kept, dropped = read_rewarded(file, tiny[0], *sections, 0.6, own=True)
    assert [group.query for group in kept] == ["kept"]
    assert kept[0].prompt == tiny[0].chat_text("kept?")
    assert dropped == {"below the similarity threshold": 1, "nothing preferred": 2, "empty": 1}


def test_of_a_warm_start_s_best_texts_none_is_held(tiny, tmp_path, monkeypatch):
    """They were, of all queries, in every process."""
    monkeypatch.setattr(preferences, "make_preferences", lambda *_: None)
    config, held = make_config(tmp_path), []
    for words in (1, 1000):
        row = {"query": "a", "candidates": [candidate("b " * words, 1.0), candidate("c", 0.5)]}
        poor = {"query": "p", "candidates": [candidate("b", 0.0)]}
        write_jsonl(tmp_path / preferences.CANDIDATES_FILE, [row, poor, row] * 20)
        run = types.SimpleNamespace(config=config, path=lambda _, name: tmp_path / name)
        tracemalloc.start()
        best, total = preferences.best_groups(run, tiny[0], *[None] * 5)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert (len(best), total) == (40, 60)
        assert [group.texts for group in best] == [["b " * words]] * 40
    assert held[1] - held[0] < 20_000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"candidates": [candidate("a", 1.0)]}, 'no field "prompt"'),
        ({"query": "a"}, 'no list "candidates"'),
        ({"query": "a", "candidates": []}, 'no list "candidates"'),
        ({"query": "a", "candidates": [{"text": "b"}]}, "candidate 0 is not"),
        ({"query": "a", "candidates": [candidate("b", True)]}, "candidate 0 is not"),
        ({"query": "a", "candidates": [candidate("b", 10**400)]}, "candidate 0 is not"),
        ({"query": "a" * 99, "candidates": [candidate("b", 1)]}, "at most 64"),
    ],
)
def test_a_bad_line_is_named(path, tmp_path, row, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl:21: .*{message}"):
        train(make_config(file), tmp_path / "run")


def test_settings_that_do_not_exist_are_refused(path, tmp_path):
    config = make_config(path)
    config.step_b = "reward_sft"
    with pytest.raises(UserError, match=r"reward_sft.*expected one of dpo, reward-sft, grpo"):
        train(config, tmp_path / "run")
    config.step_b, config.dpo.reward_temperature = "reward-sft", 0.0
    with pytest.raises(UserError, match="expected a finite number above 0"):
        train(config, tmp_path / "other")


@pytest.mark.slow
def test_joint_training_learns_from_its_candidates(tmp_path):
    workdir = tmp_path / "run"
    overrides = ["--config.step_b=reward-sft", "--config.reward.corpus_measure=ndcg"]
    overrides += ["--config.reward.group=0.5", "--config.reward.group_size=16"]
    output = finish(start(workdir, *overrides))
    queries = [row for _, row in read_jsonl(workdir / "round-0" / "candidates.jsonl", {})]
    assert f"{len(queries)} queries with candidates" in output
    terms = [c["reward_terms"] for row in queries for c in row["candidates"]]
    assert all(set(term) == {"positive", "answer", "corpus", "group"} for term in terms)
    assert len({term["group"] for term in terms}) > 5
    totals = [t["positive"] + t["answer"] + t["corpus"] + 0.5 * t["group"] for t in terms]
    found = [c["reward"] for row in queries for c in row["candidates"]]
    np.testing.assert_allclose(found, totals)
    steps = metrics(workdir, "generator")
    assert "log_prob" in steps[0]
    assert "margin" not in steps[0]
    assert (workdir / "results.json").exists()
