"""Samples texts from the generator, and keeps each one as soon as it is finished."""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax.expansion.prompts import is_repetitive, render, strip_lead_in
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.runtime.journals import DividedJournal
from expandr_jax.runtime.stopping import held

COMPLETIONS_PER_WRITE = 32


def drawing(section: Any) -> dict[str, Any]:
    """Arguments of a `Request`, all but the temperature, from a config's section that samples."""
    names = ("top_p", "max_new_tokens", "top_k", "min_p", "repetition_penalty")
    # A finished run may be older than some of these.
    return {name: section[name] for name in names if name in section}


def expansion_text(config: Any, query: str) -> str:
    """The user's message that asks for a query's expansion; `config` is the whole config."""
    settings = config.expansion
    return render(settings.strategy, query, template=settings.template)


def expansion_requests(config: Any, queries: Mapping[str, str], samples: int) -> list[Request]:
    """Requests for `samples` expansions of each query (id -> text)."""
    settings = config.expansion
    return [
        Request(
            query_id,
            sample,
            expansion_text(config, query),
            settings.temperature,
            **drawing(settings),
        )
        for query_id, query in queries.items()
        for sample in range(samples)
    ]


def sample_texts(
    sampler: Sampler,
    adapter: Any | None,
    requests: Sequence[Request],
    *,
    path: pathlib.Path,
    purpose: str,
    strip: bool = True,
) -> dict[tuple[str, int], str]:
    """Generates a text for each request, going on from a journal where one is there.

    Args:
        sampler: The generator and how it samples.
        adapter: LoRA tree, or None for the base model.
        requests: What to sample; each (id, sample) once.
        path: The journal, where finished texts are kept.
        purpose: Sets the draws of one use apart from another's.
        strip: Strip lead-ins such as "Here is a passage:".

    Returns:
        (id, sample) -> text; "" where the model said nothing.
    """
    journal = DividedJournal(path, sampler.processes, lambda row: (row["query_id"], row["sample"]))
    if not journal.finished:
        _sample(sampler, adapter, requests, journal, purpose)
    texts = {}
    for row in journal.rows:
        text = strip_lead_in(row["text"]) if strip else row["text"]
        texts[row["query_id"], row["sample"]] = text.strip()
    sampler.reporter.say(_summary(journal.rows, texts))
    return texts


def _sample(
    sampler: Sampler,
    adapter: Any | None,
    requests: Sequence[Request],
    journal: DividedJournal,
    purpose: str,
) -> None:
    done = {(row["query_id"], row["sample"]) for row in journal.rows}
    name = f"{purpose}/"
    requests = [dataclasses.replace(r, id=f"{name}{r.id}") for r in requests]
    # Samples of one prompt stay together: it is run once for all of them.
    own = sampler.processes.share(requests, key=lambda request: request.id)
    left = [r for r in own if (r.id.removeprefix(name), r.sample) not in done]
    waiting: list[dict[str, Any]] = []

    def write() -> None:
        with held():  # Half of a write would have its rows sampled again.
            journal.append(waiting)
            waiting.clear()

    try:
        progress = sampler.reporter.progress
        with progress(f"{purpose}: texts", len(own), len(own) - len(left)) as advance:
            for completion, text in sampler.generate(adapter, requests, left):
                waiting.append(
                    {
                        "query_id": completion.id.removeprefix(name),
                        "sample": completion.sample,
                        "text": text,
                        "tokens": len(completion.tokens),
                        "finished": completion.finished,
                        "near_ties": completion.near_ties,
                    }
                )
                advance(1)
                if len(waiting) >= COMPLETIONS_PER_WRITE:
                    write()
    finally:  # What is finished is kept when SIGTERM ends this, too.
        write()
    journal.finish()


def _summary(rows: list[dict[str, Any]], texts: dict[tuple[str, int], str]) -> str:
    finished = collections.Counter(row["finished"] for row in rows)
    empty = sum(not text for text in texts.values())
    repetitive = sum(is_repetitive(text) for text in texts.values())
    near_ties = sum(row["near_ties"] for row in rows)
    return (
        f"{len(rows)} texts, {sum(row['tokens'] for row in rows)} tokens; "
        f"{finished['length']} cut by length, {empty} empty, {repetitive} repetitive; "
        f"{near_ties} draws near a decision boundary"
    )
