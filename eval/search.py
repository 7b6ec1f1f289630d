"""Asks a finished run: `python -m eval.search --workdir=DIR "how do I pad an array"`.

Shows the passage that the trained generator writes, the documents found without and with it, and
how long each step took.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from rich.console import Console

from expandr_jax.config import Config, read_run_config
from expandr_jax.data.beir import read_beir
from expandr_jax.data.documents import ids_of
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, Sample, by_sample, make_expander
from expandr_jax.expansion.prompts import strip_lead_in
from expandr_jax.expansion.strategies import Ask
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.pair import phase_mesh
from expandr_jax.report.tables import Bold, render
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter, plain_console
from expandr_jax.search import Index, kept_bm25
from expandr_jax.sharding import batch_divisor, device_put_shared, make_mesh
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.vectors.query import expanded_query
from expandr_jax.vectors.stored import open_vectors
from expandr_jax.weights.hf import load_generator, load_retriever
from train.launch import define_workdir, launch

READ = (  # What is read of a run.
    "config.json", "results.json", "data", "export/retriever", "export/generator",
    "work/vectors/expandr.*", "work/bm25.index-*",
)  # fmt: skip
SNIPPET = 160  # Characters of a document that are shown.


def ask(workdir: pathlib.Path, query: str, count: int, console: Console) -> None:
    """Prints the expansion of a query and its first `count` documents before and after.

    Raises:
        UserError: The query is empty, or the workdir is not that of a finished run of train.joint.
    """
    if not query.strip():
        raise UserError('the query is empty; give it in quotes: eval.search --workdir=DIR "..."')
    config, chosen = _read_run(workdir)
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.perf_counter()
        with console.status(name):
            yield
        seconds[name] = time.perf_counter() - start

    with step("load models"):
        mesh = fitting_mesh(config, "encoding")
        made = str(workdir / "export" / "retriever")
        retriever, retriever_params = load_retriever(made, mesh=mesh)
        sampler = trained_sampler(workdir, config, console)
    with step("load index"):
        store = workdir / "work" / "documents" / "data"
        corpus = read_beir(workdir / "data", store=store if store.exists() else None).corpus
        path = workdir / "work" / "vectors" / "expandr.npy"
        index = Corpus(ids_of(corpus), open_vectors(path), config.search, path, writes=False).index
    with step("write passages"):
        encoder = TextEncoder(retriever, mesh, tokens_per_batch=config.retriever.tokens_per_batch)

        def dense(queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
            return index.search(encoder.encode(retriever_params, queries, "query"), k)

        def words() -> Index:
            return kept_bm25(workdir / "work", corpus.values(), write=False)

        expander = make_expander(config, sampler, corpus, functools.cache(words), dense)
        samples = chosen["samples"] // len(expander.strategy.asks)
        texts = expander.texts({query: query}, samples, _unkept(expander))
        passages = by_sample(texts[query])
    with step("encode"):
        plain = encoder.encode(retriever_params, [query], "query")
        expansions = encoder.encode(retriever_params, passages, "document")
        expanded = expanded_query(
            plain,
            expansions[None],
            np.array([[bool(passage) for passage in passages]]),
            query_weight=chosen["query_weight"],
            normalize=config.contrastive.normalize,
        )
    with step("search"):
        before = index.search(plain, count)
        after = index.search(np.asarray(expanded), count)

    for passage in passages:
        console.print("expansion: ", end="", style="bold")
        console.print(passage or "(empty)")
    ids = ids_of(corpus)
    for title, (scores, found) in (("query alone", before), ("query + expansion", after)):
        rows = []
        for score, place in zip(scores[0], found[0], strict=True):
            name = ids[int(place)]
            text = " ".join(corpus[name].split())
            snippet = text if len(text) <= SNIPPET else text[: SNIPPET - 1] + "…"
            rows.append([f"{score:.3f}", Bold(name), snippet])
        console.print(render(title, ("score", "document", "text"), rows))
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    console.print(f"{len(corpus)} documents; {parts} (first use compiles)")


def trained_sampler(workdir: pathlib.Path, config: Config, console: Console) -> Sampler:
    """Samples with a finished run's exported generator, as the run did for its evaluation."""
    settings, mesh = config.generator, fitting_mesh(config, "sampling")
    compute = jnp.dtype(settings.compute_dtype)
    source = str(workdir / "export" / "generator")
    generator, params = load_generator(source, dtype=compute, compute_dtype=compute, mesh=mesh)
    # Devices of a processor have one copy between them.
    params = device_put_shared(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    generator = dataclasses.replace(generator, **settings.chat)
    divisor = batch_divisor(mesh)  # This machine's devices may not divide the run's slots.
    settings = dataclasses.replace(settings, slots=math.ceil(settings.slots / divisor) * divisor)
    return Sampler(
        generator, params, "", mesh, settings, config.seed, Processes(), Reporter(console)
    )


def fitting_mesh(config: Config, phase: str) -> Mesh:
    """The run's mesh of a phase, or one of all devices where it does not fit this machine."""
    try:
        return phase_mesh(config.mesh, phase)
    except UserError:
        return make_mesh()


def _unkept(expander: Expander) -> Sample:
    """Samples a strategy's texts with the trained generator; none is kept."""

    def sample(step: Ask, requests: Sequence[Request]) -> dict[tuple[str, int], str]:
        # The query's name sets its last texts apart, as it always has.
        apart = "" if step is expander.strategy.asks[-1] else f"{step.name}/"
        requests = [dataclasses.replace(r, id=f"{apart}{r.id}") for r in requests]
        return {
            (done.id.removeprefix(apart), done.sample): strip_lead_in(text).strip()
            for done, text in expander.sampler.generate(None, requests, requests)
        }

    return sample


def _read_run(workdir: pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """A finished run's config and the choices that its system "expandr" made on dev."""
    try:
        chosen = json.loads((workdir / "results.json").read_text(encoding="utf-8"))["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{workdir}: not a finished run; train.joint makes one") from None
    config = read_run_config(workdir / "config.json")
    if "expandr" not in chosen or not (workdir / "export" / "generator").exists():
        raise UserError(
            f"{workdir}: has no expandr system or no exports; let train.joint finish it"
        )
    return config, chosen["expandr"]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        raise UserError('what to search for is missing: eval.search --workdir=DIR "a question"')
    values = flags.FLAGS
    query = " ".join(arguments[1:])
    workdir = local_copy(values.workdir, *READ)
    ask(workdir, query, values.count, plain_console())


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_integer("count", 5, "Documents shown.", lower_bound=1)


if __name__ == "__main__":
    launch(main, define_flags, words=True)
