"""Step B of so many queries with texts that are made up: memory of each stage beyond the start.

    python -m tests.step_b_memory QUERIES

Neither model is run: texts of a thousand characters and vectors of 256 numbers are made of the
requests and the texts themselves. The last line is JSON: stage -> MB.
"""

import functools
import io
import itertools
import json
import sys
import tempfile
import types
import zlib

import numpy as np
import psutil
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion import sampled
from expandr_jax.expansion.expand import make_expander
from expandr_jax.generation.requests import Completion
from expandr_jax.generation.sampler import Sampler
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.run import Run
from expandr_jax.search import ExactOptions, ScannOptions
from expandr_jax.search.settings import SearchSettings
from expandr_jax.vectors.corpus import Corpus
from train.encoding import run_retriever, run_words
from train.expansions import training_expansions
from train.preferences import make_preferences
from train.scores import RewardTools

DOCUMENTS, WIDTH, CHARACTERS, CANDIDATES = 1000, 256, 1000, 8


class Engine:
    """Says something for each request when its turn comes."""

    def generate(self, requests):
        for request in requests:
            start = f"{request.id} {request.sample} "
            text = (start * (CHARACTERS // len(start) + 1))[:CHARACTERS]
            yield Completion(request.id, request.sample, (9,) * 200, "eos", 0, None, text)


class Encoder:
    """A vector by a text's checksum."""

    def __init__(self):
        self.table = np.random.default_rng(0).normal(size=(997, WIDTH)).astype(np.float32)

    def encode(self, _params, texts, _kind, _progress=None, _cut=None):
        return self.table[[zlib.crc32(text.encode()) % 997 for text in texts]]


def measure(count: int, directory: str) -> dict[str, float]:
    """Stage -> MB beyond the start."""
    config = read_config(smoke.get_config())
    temperatures = tuple(0.5 + i / 10 for i in range(CANDIDATES))
    config = with_settings(config, {"candidates.temperatures": temperatures})
    queries = {f"query {i}": f"what is number {i} of all things asked" for i in range(count)}
    documents = {f"d{i}": f"document {i} " * 20 for i in range(DOCUMENTS)}
    qrels = {query: {f"d{i % DOCUMENTS}": 1} for i, query in enumerate(queries)}
    collection = Collection("made up", documents, queries, {"train": qrels})
    data = TrainingData(collection, list(queries), list(queries))
    run = Run(f"{directory}/run", config, Console(file=io.StringIO()))
    encoder = Encoder()
    vectors = encoder.encode(None, documents.values(), "document")
    search = SearchSettings("exact", "exact", ExactOptions(), ScannOptions())
    models = types.SimpleNamespace(encoder=encoder, normalize="both")
    retriever = run_retriever(run, models, documents, None, "expandr")
    retriever.__dict__["corpus"] = Corpus(list(documents), vectors, search)
    generator = types.SimpleNamespace(
        chat_ids=lambda text, limit: ([*text.encode()][-limit:], False),
        chat_text=lambda text: text,
        opens_thought=False,
    )
    sampler = Sampler(
        generator, None, "", None, config.generator, 0, run.processes, Reporter(run.console)
    )
    Sampler.engine = lambda self, adapter, extent: Engine()
    sampled.COMPLETIONS_PER_WRITE = 2048  # A disk is not what is measured.
    expander = make_expander(
        config.expansion, sampler, documents, None, None,
        most_characters=config.answer.max_characters, drop_identical_ids=False,
    )  # fmt: skip
    tools = RewardTools(run_words(run, documents))
    stages = (
        ("expansions", functools.partial(training_expansions, run, data, expander, None, 0)),
        (
            "rewards",
            functools.partial(
                make_preferences, run, generator, expander, None, retriever, data, "round-0", tools
            ),
        ),
    )
    with run.phase("small first"):  # What programs and libraries take, whatever the size.
        few = dict(itertools.islice(queries.items(), 64))
        small = TrainingData(
            Collection("small", documents, few, {"train": {q: qrels[q] for q in few}}),
            [*few],
            [*few],
        )
        training_expansions(run, small, expander, None, 1)
        make_preferences(run, generator, expander, None, retriever, small, "round-1", tools)
    start = psutil.Process().memory_info().rss
    for name, stage in stages:
        with run.phase(name):
            stage()
    run.close()
    phases = json.loads((run.workdir / "timings.json").read_text())["phases"]
    return {
        row["phase"].removesuffix(", round 0"): round((row["peak_memory_bytes"] - start) / 1e6, 1)
        for row in phases
        if not row["phase"].startswith("small") and "round 1" not in row["phase"]
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(int(sys.argv[1]), directory)))
