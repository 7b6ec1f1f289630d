"""From candidates to pairs, as `train.joint` makes them."""

import dataclasses
import functools
import io
import json
import types

import numpy as np
import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.expansion.expand import expansion_requests, make_expander
from expandr_jax.files.records import read_jsonl
from expandr_jax.rewards import evidence, registry, sampled
from expandr_jax.rewards.functions import RewardFunction
from expandr_jax.rewards.registry import REWARDS
from expandr_jax.rewards.sampled import sample_candidates, self_answers
from expandr_jax.runtime.run import Run
from expandr_jax.search import Bm25Index, ExactOptions, ScannOptions, kept_bm25
from expandr_jax.search.settings import SearchSettings
from expandr_jax.vectors.corpus import Corpus
from train import encoding, preferences
from train.encoding import run_retriever, run_words
from train.scores import RewardTools

IDS = [f"d{i}" for i in range(20)]
QUERIES = {"q0": "first", "q1": "second", **{f"q{i}": f"query {i}" for i in range(2, 8)}}
# q2 has many relevant documents, of several grades.
QRELS = {"q0": {"d3": 1}, "q1": {"d5": 1}, "q2": {f"d{i}": 1 + i % 3 for i in range(2, 14)}}
QRELS |= {f"q{i}": {f"d{i}": 1, f"d{i + 1}": 2, f"d{2 * i}": 1} for i in range(3, 8)}


class Encoder:
    """Every text has a vector of its own."""

    def encode(self, _params, texts, _kind, _progress=None, _cut=None):
        return np.stack(
            [np.random.default_rng(sum(text.encode())).normal(size=8) for text in texts]
        ).astype(np.float32)


class Sampled(dict):
    """Texts by query and sample, with what the journal says of them."""

    def row(self, key):
        return {"tokens": key[1] + 1, "finished": "eos" if key[1] else "length"}


@pytest.fixture
def make(tmp_path, monkeypatch):
    config = read_config(smoke.get_config())
    count = len(config.candidates.temperatures) * config.candidates.per_temperature
    texts = Sampled({(q, i): f"{q} text {i}" for q in QUERIES for i in range(count)})
    answers = {query: f"answer of {query}" for query in QUERIES}
    monkeypatch.setattr(preferences, "sample_candidates", lambda *_: (QUERIES, texts))
    monkeypatch.setattr(preferences, "self_answers", lambda *_: answers)
    texts_of_documents = {document: f"text of {document}" for document in IDS}
    vectors = Encoder().encode(None, texts_of_documents.values(), "document")
    corpus = Corpus(IDS, vectors, SearchSettings("exact", "exact", ExactOptions(), ScannOptions()))
    collection = Collection("c", texts_of_documents, QUERIES, {"train": QRELS})
    data = TrainingData(collection, [], list(QUERIES))
    run = Run(tmp_path / "run", config, Console(file=io.StringIO()))
    models = types.SimpleNamespace(encoder=Encoder(), normalize="both")
    retriever = run_retriever(run, models, texts_of_documents, None, "expandr")
    retriever.__dict__["corpus"] = corpus
    generator = types.SimpleNamespace(chat_text=lambda text: text)

    limits = {"most_characters": 100, "drop_identical_ids": False}
    expander = make_expander(config.expansion, None, texts_of_documents, None, None, **limits)

    def make_preferences(*functions):
        tools = RewardTools(run_words(run, texts_of_documents), functions)
        return preferences.make_preferences(
            run, generator, expander, None, retriever, data, "round-0", tools
        )

    yield make_preferences, run
    run.close()


def test_pairs_are_made(make):
    make_preferences, run = make
    make_preferences()
    for name in ("candidates", "preferences"):
        rows = [row for _, row in read_jsonl(run.path("round-0", f"{name}.jsonl"), {})]
        assert {row["query_id"] for row in rows} == set(QUERIES)


def test_lengths_and_formats_are_those_of_the_texts_as_sampled(make):
    make_preferences, run = make
    weights = {"reward.length": 0.5, "reward.length_cache": 7, "reward.format": 2.0}
    run.config = with_settings(
        run.config, {**weights, "reward.format_pattern": "q[0-3].*", "reward.corpus": 0.0}
    )
    make_preferences()
    for _, row in read_jsonl(run.path("round-0", "candidates.jsonl"), {}):
        for i, found in enumerate(row["candidates"]):
            terms = found["reward_terms"]
            # Of 8 tokens at most, the second one is past what is free; the first text was cut.
            assert terms["length"] == (-i / 7 if i else -1)
            assert terms["format"] == (row["query_id"] in ("q0", "q1", "q2", "q3"))
            assert found["reward"] == pytest.approx(
                terms["positive"] + terms["answer"] + terms["length"] / 2 + 2 * terms["format"]
            )


def test_a_reward_has_the_lengths_that_its_record_asks_for(make, monkeypatch):
    make_preferences, run = make
    run.config = with_settings(run.config, {"reward.format": 1.0, "reward.corpus": 0.0})

    def lengths(evidence):
        return np.array([[c.length or 0.0 for c in group.candidates] for group in evidence.groups])

    for asks in (False, True):
        reward = registry.Reward(lengths, lengths=asks)
        monkeypatch.setitem(registry.REWARDS, "format", reward)
        make_preferences()
        path = run.path("round-0", "candidates.jsonl")
        for _, row in read_jsonl(path, {}):
            for i, found in enumerate(row["candidates"]):
                assert found["reward_terms"]["format"] == (i + 1 if asks else 0)
        path.unlink()


def test_a_function_of_one_s_own_that_fails_is_a_line_and_leaves_no_file(make):
    make_preferences, run = make
    name = "function:my.module:f"
    run.config = with_settings(run.config, {"reward.functions": ("my.module:f",)})
    wrong = {"at": "q5"}

    def f(queries, texts, judgements):
        places = {text: place for place, text in enumerate(QUERIES.values())}
        rows = [[float(places[query] + i) for i in range(len(own))]
                for query, own in zip(queries, texts, strict=True)]  # fmt: skip
        assert judgements == [QRELS[f"q{places[query]}"] for query in queries]
        if wrong:
            rows[5].pop()
        return rows

    function = RewardFunction("my.module:f", f, __file__, "")
    with pytest.raises(UserError, match=r"my\.module:f gave \d+ values for query q5; expected"):
        make_preferences(function)
    assert not run.path("round-0", "candidates.jsonl").exists()
    wrong.clear()
    make_preferences(function)
    rows = [row for _, row in read_jsonl(run.path("round-0", "candidates.jsonl"), {})]
    for place, row in enumerate(rows):
        assert [c["reward_terms"][name] for c in row["candidates"]] == [
            place + i for i in range(len(row["candidates"]))
        ]


@pytest.mark.parametrize("size", [1, 3])
def test_blocks_of_queries_give_the_same_files(make, monkeypatch, size):
    """But for rounding, as of another shape; no more texts than a block's are encoded at once."""
    make_preferences, run = make
    weights = {f"reward.{name}": 1.0 for name in REWARDS}
    sizes = {"reward.depth": 7, "reward.group_size": 5, "reward.search": "fused",
             "reward.length_cache": 7}  # fmt: skip
    run.config = with_settings(run.config, {**weights, **sizes})
    paths = [run.path("round-0", f"{name}.jsonl") for name in ("candidates", "preferences")]

    def written():
        make_preferences()
        found = [path.read_text().splitlines() for path in paths]
        for path in paths:
            path.write_text("damaged")
        rounded = functools.partial(json.loads, parse_float=lambda text: round(float(text), 4))
        return [[*map(rounded, lines)] for lines in found]

    whole = written()
    encoded, opened, real = [], [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, p, t, *a: encoded.append(len(t)) or real(self, p, t, *a)
    )
    monkeypatch.setattr(
        encoding, "kept_bm25", lambda *a, **how: opened.append(a) or kept_bm25(*a, **how)
    )
    # What the run keeps is opened, and not made again.
    monkeypatch.setattr(Bm25Index, "__init__", None)
    monkeypatch.setattr(preferences, "queries_at_once", lambda candidates: size)
    programs = evidence._normalized._cache_size()
    assert written() == whole
    # One for the candidates of a block, one for a vector a query, whatever the number of blocks.
    assert evidence._normalized._cache_size() <= programs + 2
    candidates = len(run.config.candidates.all_temperatures)
    assert max(encoded) == size * (candidates + 1)
    assert len(opened) == 1  # BM25's index is for all blocks.


def test_a_generator_that_answers_nothing_is_a_line(make, monkeypatch):
    make_preferences, run = make
    monkeypatch.setattr(preferences, "self_answers", self_answers)  # The real one.
    monkeypatch.setattr(sampled, "sample_texts", lambda *_, **__: {})
    with pytest.raises(UserError, match="round 0: the generator left every self-answer empty"):
        make_preferences()
    assert not run.path("round-0", "candidates.jsonl").exists()


def test_each_stage_draws_as_its_own_section_says(make, monkeypatch):
    _, run = make
    monkeypatch.undo()  # The stages themselves.
    asked = []

    def sample_texts(_sampler, _adapter, requests, **_):
        asked.append(requests)
        return {(request.id, request.sample): "text" for request in requests}

    sampler = types.SimpleNamespace(fits=lambda _: True)
    monkeypatch.setattr(sampled, "sample_texts", sample_texts)
    sections = {
        "expansion": (0.5, 0.7, 9, 4, 0.1, 1.1),
        "candidates": (None, 0.8, 8, 5, 0.2, 1.2),
        "answer": (0.6, 0.9, 7, 6, 0.3, 1.3),
    }
    names = ("temperature", "top_p", "max_new_tokens", "top_k", "min_p", "repetition_penalty")
    for section, values in sections.items():
        given = {f"{section}.{n}": value for n, value in zip(names, values, strict=True) if value}
        run.config = with_settings(run.config, given)
    collection = Collection("c", {"d3": "a", "d5": "b"}, QUERIES, {"train": {"q0": {"d3": 1}}})
    data = TrainingData(collection, [], ["q0"])
    expander = make_expander(
        run.config.expansion, sampler, collection.corpus, None, None,
        most_characters=100, drop_identical_ids=False,
    )  # fmt: skip
    config, directory = run.config, run.path("work", "round-0")
    sample_candidates(expander, None, data, config.candidates, directory)
    self_answers(None, None, data, config.answer, directory)
    asked.append(expansion_requests(run.config.expansion, QUERIES, 1))
    for prompts, section in zip(asked, ("candidates", "answer", "expansion"), strict=True):
        for prompt in prompts:
            found = tuple(getattr(prompt, name) for name in names)
            assert found[1:] == sections[section][1:]
            assert sections[section][0] in (None, found[0])
    temperatures = [prompt.temperature for prompt in asked[0]]
    assert temperatures == list(run.config.candidates.temperatures)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_stops_the_run_and_names_the_query(make, monkeypatch, value):
    make_preferences, run = make
    real = registry.REWARDS["corpus"]

    def broken(*args):
        rewards = np.array(real.of(*args))
        rewards[1, 2] = value
        return rewards

    monkeypatch.setitem(registry.REWARDS, "corpus", dataclasses.replace(real, of=broken))
    with pytest.raises(NotFiniteError, match="rewards, round 0: not finite for queries q1;"):
        make_preferences()
    assert not run.path("round-0", "preferences.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [("q1 text 2", "candidates of q1: "), ("answer of q0", "answer to q0: "),
     ("second", "query q1: ")],
)  # fmt: skip
def test_a_vector_that_is_not_finite_stops_the_run_and_names_the_query(
    make, monkeypatch, text, named
):
    make_preferences, _ = make
    real = Encoder.encode

    def broken(self, params, texts, kind, progress=None, cut=None):
        if text in texts:
            raise NotFiniteError("its vector is not finite", row=list(texts).index(text))
        return real(self, params, texts, kind, progress, cut)

    monkeypatch.setattr(Encoder, "encode", broken)
    with pytest.raises(NotFiniteError, match=f"^{named}its vector is not finite.*checkpoint: "):
        make_preferences()
