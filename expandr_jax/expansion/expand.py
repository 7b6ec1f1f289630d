"""Samples texts from the generator, and keeps each one as soon as it is finished."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics
from expandr_jax.data.documents import ids_of
from expandr_jax.errors import UserError
from expandr_jax.expansion.prompts import is_repetitive, strip_lead_in
from expandr_jax.expansion.strategies import Ask, Search, Strategy, strategy
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.runtime.journals import DividedJournal
from expandr_jax.runtime.stopping import held
from expandr_jax.search import Index, search_named

COMPLETIONS_PER_WRITE = 32
LEAST_RANKED = 100  # Results among which those of equal scores are put in order, as in runs/.


def drawing(section: Any) -> dict[str, Any]:
    """Arguments of a `Request`, all but the temperature, from a config's section that samples."""
    names = ("top_p", "max_new_tokens", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(section, name) for name in names}


def expansion_text(config: Any, query: str) -> str:
    """The user's message that asks for a query's expansion; `config` is the whole config.

    Raises:
        UserError: The strategy's prompt shows passages, which a query alone does not have.
    """
    settings = config.expansion
    prompt = strategy(settings.strategy, settings.template).asks[-1].prompt
    if "passages" in prompt.fields:
        raise UserError(
            f"expansion.strategy {settings.strategy!r} shows passages in its prompt; expected a "
            "prompt beside each query"
        )
    return prompt.message(query)


Sample = Callable[[Ask, Sequence[Request]], Mapping[tuple[str, int], str]]
# Queries and k to scores and rows of the corpus, [queries, k] each.
SearchTexts = Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Expander:
    """Expands queries by one strategy.

    Attributes:
        strategy: What is asked and searched for.
        sampler: The generator.
        settings: How texts are drawn: the config's section `expansion`.
        most_characters: Characters of a passage that a prompt shows, at most.
        search: (step, query id -> what is searched for, n) to query id -> its n best passages.
    """

    strategy: Strategy
    sampler: Sampler
    settings: Any
    most_characters: int
    search: Callable[[Search, Mapping[str, str], int], Mapping[str, Sequence[str]]]

    def texts(
        self, queries: Mapping[str, str], samples: int, sample: Sample
    ) -> dict[str, list[list[str]]]:
        """Takes all steps for several queries.

        Args:
            queries: Query id -> query.
            samples: How often each `Ask` is answered.
            sample: (step, requests) to (query id, sample) -> text; as `journaled` returns it.

        Returns:
            Query id -> the texts of each `Ask`; "" where the model said nothing.
        """
        texts: dict[str, list[list[str]]] = {query: [] for query in queries}
        shown: dict[str, Sequence[str]] = dict.fromkeys(queries, ())
        seen: dict[str, set[str]] = {query: set() for query in queries}
        limits = self.most_characters, self.sampler.fits
        for step in self.strategy.steps:
            if isinstance(step, Ask):
                messages = {q: step.message(t, shown[q], *limits) for q, t in queries.items()}
                made = sample(step, expansion_requests(self.settings, messages, samples))
                for query in queries:
                    texts[query].append([made[query, i] for i in range(samples)])
                continue
            asked = dict(queries)
            if step.query is not None:
                made = {q: [t for several in texts[q] for t in several if t] for q in queries}
                asked = {q: step.query(text, made[q]) for q, text in queries.items()}
            passed_over = max(map(len, seen.values()), default=0) if step.unseen else 0
            for query, found in self.search(step, asked, step.depth + passed_over).items():
                new = [p for p in found if not (step.unseen and p in seen[query])]
                shown[query] = new[: step.depth]
                seen[query] |= {*shown[query]}
        return texts

    def messages(self, queries: Mapping[str, str], sample: Sample) -> dict[str, str]:
        """The message of each query's last `Ask`, after one sample of those before; as `texts`."""
        messages: dict[str, str] = {}

        def before(step: Ask, requests: Sequence[Request]) -> Mapping[tuple[str, int], str]:
            if step is not self.strategy.asks[-1]:
                return sample(step, requests)
            messages.update((request.id, request.prompt) for request in requests)
            return {(request.id, request.sample): "" for request in requests}

        self.texts(queries, 1, before)
        return messages


def by_sample(asks: Sequence[Sequence[str]]) -> list[str]:
    """A sample's text of each `Ask`, then those of the next sample, of texts [asks][samples]."""
    return [text for sample in zip(*asks, strict=True) for text in sample]


def journaled(
    expander: Expander, adapter: Any | None, path: pathlib.Path, purpose: str, strip: bool = True
) -> Sample:
    """Samples a strategy's texts by `sample_texts`.

    Path and purpose are those of the last `Ask`; those of the others have their names behind them.
    """

    def sample(step: Ask, requests: Sequence[Request]) -> dict[tuple[str, int], str]:
        where, named = path, purpose
        if step is not expander.strategy.asks[-1]:
            where, named = path.with_stem(f"{path.stem}-{step.name}"), f"{purpose}, {step.name}"
        return sample_texts(
            expander.sampler, adapter, requests, path=where, purpose=named, strip=strip
        )

    return sample


def make_expander(
    config: Any,
    sampler: Sampler,
    corpus: Mapping[str, str],
    bm25: Callable[[], Index],
    dense: SearchTexts,
) -> Expander:
    """Expands queries as the whole config says, with passages of a corpus, document id -> text.

    BM25's index of it is asked for when a step first needs it; `dense` searches it by vectors.
    Raises UserError of a wrong strategy or template.
    """
    searches = {"bm25": lambda queries, k: bm25().search(queries, k), "dense": dense}
    ids, drop = ids_of(corpus), config.evaluation.drop_identical_ids

    def search(step: Search, asked: Mapping[str, str], count: int) -> dict[str, list[str]]:
        run = search_named(
            searches[step.by],
            list(asked),
            list(asked.values()),
            ids,
            # One more, so that a tie at the end is not cut before it is ranked.
            max(count, LEAST_RANKED) + drop,
            drop_identical_ids=drop,
            above=0.0 if step.by == "bm25" else -np.inf,
        )
        return {
            query: [corpus[document] for document, _ in metrics.rank_documents(found)[:count]]
            for query, found in run.items()
        }

    asked = strategy(config.expansion.strategy, config.expansion.template)
    return Expander(asked, sampler, config.expansion, config.answer.max_characters, search)


def expansion_requests(settings: Any, messages: Mapping[str, str], samples: int) -> list[Request]:
    """Requests for several texts of each message, drawn as the config's `expansion` says."""
    return [
        Request(query, sample, message, settings.temperature, **drawing(settings))
        for query, message in messages.items()
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
    """The texts of `sample_journal`, by (id, sample); "" where the model said nothing.

    With `strip`, lead-ins such as "Here is a passage:" are taken off them.
    """
    texts = {}
    rows = sample_journal(sampler, adapter, requests, path=path, purpose=purpose)
    for row in rows:
        text = strip_lead_in(row["text"]) if strip else row["text"]
        texts[row["query_id"], row["sample"]] = text.strip()
    sampler.reporter.say(_summary(rows, texts))
    return texts


def sample_journal(
    sampler: Sampler,
    adapter: Any | None,
    requests: Sequence[Request],
    *,
    path: pathlib.Path,
    purpose: str,
) -> list[dict[str, Any]]:
    """Generates a text for each request, going on from a journal where one is there.

    Args:
        sampler: The generator and how it samples.
        adapter: LoRA tree, or None for the base model.
        requests: What to sample; each (id, sample) once.
        path: The journal, where finished texts are kept.
        purpose: Sets the draws of one use apart from another's.

    Returns:
        {"query_id", "sample", "text", "tokens", "finished", "near_ties"} of each request; with the
        sampler's `log_probs` also "token_ids" and "log_probs", as `Completion` has them.
    """
    journal = DividedJournal(path, sampler.processes, lambda row: (row["query_id"], row["sample"]))
    if journal.finished:
        return journal.rows
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
                row = {
                    "query_id": completion.id.removeprefix(name),
                    "sample": completion.sample,
                    "text": text,
                    "tokens": len(completion.tokens),
                    "finished": completion.finished,
                    "near_ties": completion.near_ties,
                }
                if completion.log_probs is not None:  # What on-policy training needs, too.
                    row["token_ids"] = [*completion.tokens]
                    row["log_probs"] = [*completion.log_probs]
                waiting.append(row)
                advance(1)
                if len(waiting) >= COMPLETIONS_PER_WRITE:
                    write()
    finally:  # What is finished is kept when SIGTERM ends this, too.
        write()
    journal.finish()
    return journal.rows


def _summary(rows: list[dict[str, Any]], texts: dict[tuple[str, int], str]) -> str:
    finished = collections.Counter(row["finished"] for row in rows)
    empty = sum(not text for text in texts.values())
    repetitive = sum(is_repetitive(text) for text in texts.values())
    near_ties = sum(row["near_ties"] for row in rows)
    # A server's word for a prompt that is too long for it.
    refused = f" ({finished['refused']} of them refused)" if finished["refused"] else ""
    return (
        f"{len(rows)} texts, {sum(row['tokens'] for row in rows)} tokens; "
        f"{finished['length']} cut by length, {empty} empty{refused}, {repetitive} repetitive; "
        f"{near_ties} draws near a decision boundary"
    )
