"""Samples texts from the generator, and keeps each one as soon as it is finished.

What a run has sampled is on disk. In memory are requests that run, and of each text its key.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from expandr_jax.expansion.prompts import is_repetitive, strip_lead_in
from expandr_jax.files.records import Rows, hash_json, write_json
from expandr_jax.generation.requests import Request, Requests
from expandr_jax.generation.sampler import Sampler
from expandr_jax.runtime.journals import DividedJournal, Keys, finished_key
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.stopping import held

COMPLETIONS_PER_WRITE = 32

Texts = Mapping[tuple[str, int], str]  # (query id, sample) -> text.


class MadeWhenAsked(Mapping):
    """A mapping of some keys, whose values a function makes each time."""

    def __init__(self, keys: Collection[Any], make: Callable[[Any], Any]):
        self._keys, self._make = keys, make

    def __getitem__(self, key: Any) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # Without making it.

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class SampledTexts(Mapping):
    """(Query id, sample) -> text, "" where the model said nothing; read when they are asked for.

    Attributes:
        rows: As of `sample_journal`.
        strip: Whether lead-ins such as "Here is a passage:" are taken off.
        opens_thought: Whether each text goes on from a thought that the chat template began.
            Journals of older runs lack the mark, without which a thought that was cut is no text.
    """

    def __init__(self, rows: Rows, strip: bool, opens_thought: bool = False):
        self.rows, self._strip = rows, strip
        self._begins = "<think>" if opens_thought else ""

    @functools.cached_property
    def _keys(self) -> Keys:
        """Made when a text is first asked for: a restart may need none."""
        return Keys(map(_key, self.rows))

    def __getitem__(self, key: tuple[str, int]) -> str:
        return self.text(self.row(key))

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return map(_key, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def key(self) -> str:
        """Tells them from other texts."""
        return hash_json([finished_key(self.rows), self._strip, self._begins])

    def row(self, key: tuple[str, int]) -> Mapping[str, Any]:
        """The row of a text; KeyError if there is none."""
        number = self._keys.row(key)
        if number is None:
            raise KeyError(key)
        return self.rows[number]

    def text(self, row: Mapping[str, Any]) -> str:
        """The text of a row."""
        text = row["text"].strip()
        if not self._strip:
            return text
        begins = "" if text.startswith(self._begins) else self._begins
        return strip_lead_in(begins + text).strip()


def sample_texts(
    sampler: Sampler,
    adapter: Any | None,
    requests: Iterable[Request],
    *,
    path: pathlib.Path,
    purpose: str,
    strip: bool = True,
) -> SampledTexts:
    """The texts of `sample_journal`, whose arguments these are, and `SampledTexts`'s."""
    rows = sample_journal(sampler, adapter, requests, path=path, purpose=purpose)
    texts = SampledTexts(rows, strip, sampler.generator.opens_thought)
    if sampler.processes.is_main:  # It speaks for all.
        sampler.reporter.say(_summary(texts, counts_of(path), sampler.reporter))
    return texts


def counts_of(path: pathlib.Path) -> pathlib.Path:
    """The file beside a journal of texts that has what was counted of them."""
    return path.with_name(f"{path.name}.counts.json")


def sample_journal(
    sampler: Sampler,
    adapter: Any | None,
    requests: Iterable[Request],
    *,
    path: pathlib.Path,
    purpose: str,
) -> Rows:
    """Generates a text for each request, going on from a journal where one is there.

    All processes of a run call it together. Requests are divided among them by query, and made,
    templated and tokenised when their turn comes.

    Args:
        sampler: The generator and how it samples.
        adapter: LoRA tree, or None for the base model.
        requests: What to sample; each (id, sample) once.
        path: The journal, where finished texts are kept.
        purpose: Sets the draws of one use apart from another's.

    Returns:
        {"query_id", "sample", "text", "tokens", "finished", "near_ties"} of each request, by query
        id and sample; with the sampler's `log_probs` also "token_ids" and "log_probs", as
        `Completion` has them.
    """
    processes = sampler.processes
    journal = DividedJournal(path, processes, _key)
    if journal.finished:
        return journal.rows
    done = journal.keys()
    # Samples of one prompt stay together: it is run once for all of them.
    own = Requests.of(requests).share(processes.index, processes.count)
    name = f"{purpose}/"

    def named(query: str) -> list[Request]:
        return [dataclasses.replace(r, id=f"{name}{r.id}") for r in own.make(query)]

    def left() -> Iterator[Request]:
        for query, count in zip(own.ids, own.counts, strict=True):
            if done.count(query) < count:
                yield from (r for r in named(query) if (query, r.sample) not in done)

    waiting: list[dict[str, Any]] = []

    def write() -> None:
        with held():  # Half of a write would have its rows sampled again.
            journal.append(waiting)
            waiting.clear()

    try:
        before = sum(map(done.count, own.ids))
        asked = dataclasses.replace(own, make=named)
        with sampler.reporter.progress(f"{purpose}: texts", len(own), before) as advance:
            for completion, text in sampler.generate(adapter, asked, left()):
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


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["query_id"], row["sample"]


def _summary(texts: SampledTexts, kept: pathlib.Path, reporter: Reporter) -> str:
    """What is said of texts; a restart says it by what was counted when they were made."""
    counted: collections.Counter[str] = collections.Counter()
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        record = json.loads(kept.read_bytes())
        counted.update(record["counts"] if record.get("key") == texts.key else {})
    if not counted:
        with reporter.progress("texts counted", len(texts)) as advance:
            counted = _counts(texts, advance)
        write_json(kept, {"key": texts.key, "counts": counted})
    # A server's word for a prompt that is too long for it.
    refused = f" ({counted['refused']} of them refused)" if counted["refused"] else ""
    return (
        f"{len(texts)} texts, {counted['tokens']} tokens; "
        f"{counted['length']} cut by length, {counted['empty']} empty{refused}, "
        f"{counted['repetitive']} repetitive; "
        f"{counted['near ties']} draws near a decision boundary"
    )


def _counts(texts: SampledTexts, advance: Callable[[int], None]) -> collections.Counter[str]:
    counted: collections.Counter[str] = collections.Counter()
    for row in texts.rows:
        text = texts.text(row)
        counted[row["finished"]] += 1
        counted["tokens"] += row["tokens"]
        counted["near ties"] += row["near_ties"]
        counted["empty"] += not text
        counted["repetitive"] += is_repetitive(text)
        advance(1)
    return counted
