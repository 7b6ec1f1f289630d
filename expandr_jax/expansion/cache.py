"""A cache of generated texts: no model generates twice for the same request."""

import contextlib
import dataclasses
import fcntl
import pathlib
from collections.abc import Iterable, Iterator

from expandr_jax.errors import UserError
from expandr_jax.expansion.prompts import strip_lead_in
from expandr_jax.expansion.sampled import counts_of, sample_texts
from expandr_jax.files.records import hash_json, read_jsonl, write_jsonl
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.runtime.progress import Reporter

CACHED_FIELDS = {"query_id": str, "sample": int, "prompt": str, "text": str}
_HASH_LENGTH = 16  # Hex digits.
CacheKey = tuple[str, int, str]  # Query id, sample, hash of the prompt and of how it is answered.


def kept_texts(
    directory: pathlib.Path,
    sampler: Sampler,
    name: str,
    requests: Iterable[Request],
    timed: contextlib.AbstractContextManager,
) -> dict[tuple[str, int], str]:
    """The texts of some requests; those that are not kept yet are generated and kept.

    A text depends on the model's weights, options and types, its tokenizer and chat template, the
    longest prompt that it may have, or the server's model; on the seed, the strategy, stop strings,
    the message with its temperature and lengths, the query's id and the number of the sample. All
    of them are looked up.

    Args:
        directory: A file for each strategy, model and seed, a line for each request; several
            workdirs may share it.
        sampler: The generator, the base model of which is asked.
        name: Sets the draws of these requests apart from others'.
        requests: Users' messages, each (id, sample) once.
        timed: Entered while texts are generated, if any are.

    Returns:
        (id, sample) -> text without its lead-in; "" where the model said nothing.

    Raises:
        UserError: The directory cannot be written, or a file in it is damaged.
    """
    settings, server = sampler.settings, sampler.settings.server
    model = [sampler.weights_hash, sampler.generator.identity, max(settings.prompt_buckets)]
    model += [server.model] if server.url else []
    named = [*model, sampler.seed, name, *settings.stop]
    path = directory / f"{name}-{hash_json(named)[:_HASH_LENGTH]}.jsonl"
    keys: list[CacheKey] = []
    missing: list[Request] = []
    with _locked(path, sampler.reporter):
        kept = _read(path)
        for request in requests:  # Each may be made for this; those that are kept are not held.
            keys.append(_key(request))
            if keys[-1] not in kept:
                missing.append(request)
        if missing:
            # The same requests go on from there after a kill.
            which = hash_json([dataclasses.astuple(request) for request in missing])[:_HASH_LENGTH]
            journal = path.with_suffix(f".{which}.new")
            with timed:
                made = sample_texts(sampler, None, missing, path=journal, purpose=name, strip=False)
            kept |= {_key(request): made[request.id, request.sample] for request in missing}
            write_jsonl(
                path,
                (
                    {**dict(zip(CACHED_FIELDS, key, strict=False)), "text": text}
                    for key, text in sorted(kept.items())
                ),
            )
            for done in (journal, counts_of(journal)):
                done.unlink(missing_ok=True)
    if there := len(keys) - len(missing):
        sampler.reporter.say(f"{there} texts of {name} were there already")
    return {key[:2]: strip_lead_in(kept[key]).strip() for key in keys}


@contextlib.contextmanager
def _locked(path: pathlib.Path, reporter: Reporter) -> Iterator[None]:
    """Locks a file of texts, so that no other process generates the same ones."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path.parent}: texts cannot be kept there: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.say(f"another process writes {path}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(request: Request) -> CacheKey:
    asked = [request.prompt, request.temperature, request.top_p, request.max_new_tokens]
    rest = [request.top_k, request.min_p, request.repetition_penalty]
    if rest != [0, 0.0, 1.0]:  # Left out where they change nothing, so that kept texts still serve.
        asked += rest
    return request.id, request.sample, hash_json(asked)[:_HASH_LENGTH]


def _read(path: pathlib.Path) -> dict[CacheKey, str]:
    if not path.exists():
        return {}
    rows = (row for _, row in read_jsonl(path, CACHED_FIELDS))
    return {(row["query_id"], row["sample"], row["prompt"]): row["text"] for row in rows}
