"""Samples texts from the generator, and keeps each one as soon as it is finished."""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from expandr_jax.errors import UserError
from expandr_jax.expansion.prompts import is_repetitive, render, strip_lead_in
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request, common_prefix
from expandr_jax.generation.server import ServerEngine
from expandr_jax.pair import Models, sampling_memory, slots_of_a_process
from expandr_jax.runtime.journals import DividedJournal
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.stopping import held

COMPLETIONS_PER_WRITE = 32


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One text to sample.

    Attributes:
        query_id: Whose text it is; with `sample`, decides the random draws.
        sample: Index among the query's texts.
        text: The user's message.
        temperature: 0 is greedy.
        top_p: Probability mass that is sampled from.
        max_new_tokens: Most tokens, EOS included.
        top_k: Number of tokens that are sampled from; 0 means all.
        min_p: Least probability relative to the likeliest token's.
        repetition_penalty: Above 1 makes tokens of the prompt and of the text so far less likely.
    """

    query_id: str
    sample: int
    text: str
    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def drawing(section: ml_collections.ConfigDict) -> dict[str, Any]:
    """How a section of the config has its texts drawn, all but the temperature.

    Args:
        section: The config's `expansion`, `candidates` or `answer`.

    Returns:
        Arguments of a `Prompt` or a `Request`.
    """
    names = ("top_p", "max_new_tokens", "top_k", "min_p", "repetition_penalty")
    # A finished run may be older than some of these.
    return {name: section[name] for name in names if name in section}


def expansion_text(config: ml_collections.ConfigDict, query: str) -> str:
    """The user's message that asks for a query's expansion; `config` is the whole config."""
    settings = config.expansion
    return render(settings.strategy, query, template=settings.template)


def expansion_prompts(
    config: ml_collections.ConfigDict, queries: Mapping[str, str], samples: int
) -> list[Prompt]:
    """Prompts for `samples` expansions of each query (id -> text)."""
    settings = config.expansion
    return [
        Prompt(
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
    run: Run,
    models: Models,
    adapter: Any | None,
    prompts: Sequence[Prompt],
    *,
    path: pathlib.Path,
    purpose: str,
    strip: bool = True,
) -> dict[tuple[str, int], str]:
    """Generates a text for each prompt, going on from a journal where one is there.

    Args:
        run: Config of the engine, progress.
        models: The generator.
        adapter: LoRA tree, or None for the base model.
        prompts: What to sample; each (query_id, sample) once.
        path: Where finished texts are kept.
        purpose: Sets the draws of one use apart from another's.
        strip: Strip lead-ins such as "Here is a passage:".

    Returns:
        (query id, sample) -> text; "" where the model said nothing.
    """
    journal = DividedJournal(path, run.processes, lambda row: (row["query_id"], row["sample"]))
    if not journal.finished:
        requests, cut = [], 0
        limit = max(run.config.generator.prompt_buckets)
        for prompt in prompts:
            ids, truncated = models.generator.chat_ids(prompt.text, limit)
            cut += truncated
            requests.append(
                Request(
                    id=f"{purpose}/{prompt.query_id}",
                    sample=prompt.sample,
                    prompt=tuple(ids),
                    temperature=prompt.temperature,
                    top_p=prompt.top_p,
                    max_new_tokens=prompt.max_new_tokens,
                    top_k=prompt.top_k,
                    min_p=prompt.min_p,
                    repetition_penalty=prompt.repetition_penalty,
                )
            )
        if cut:
            run.console.print(f"  {cut} prompts lost their beginning (over {limit} tokens)")
        _sample(run, models, adapter, requests, journal, purpose)
    texts = {}
    for row in journal.rows:
        text = strip_lead_in(row["text"]) if strip else row["text"]
        texts[row["query_id"], row["sample"]] = text.strip()
    _report(run, journal.rows, texts)
    return texts


def _sample(
    run: Run,
    models: Models,
    adapter: Any | None,
    requests: list[Request],
    journal: DividedJournal,
    purpose: str,
) -> None:
    done = {(row["query_id"], row["sample"]) for row in journal.rows}
    name = f"{purpose}/"
    # Samples of one prompt stay together: it is run once for all of them.
    own = run.processes.share(requests, key=lambda request: request.id)
    left = [r for r in own if (r.id.removeprefix(name), r.sample) not in done]
    engine = _server(run, models, adapter) or _engine(run, models, adapter, requests)
    waiting: list[dict[str, Any]] = []

    def write() -> None:
        with held():  # Half of a write would have its rows sampled again.
            journal.append(waiting)
            waiting.clear()

    try:
        with run.progress(f"{purpose}: texts", len(own), len(own) - len(left)) as advance:
            for completion in engine.generate(left):
                text = completion.text
                if text is None:
                    text = models.generator.decode(list(completion.tokens))
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


def _engine(run: Run, models: Models, adapter: Any | None, requests: Sequence[Request]) -> Engine:
    """The engine that samples here."""
    settings = run.config.generator
    # Slots have room for this stage's longest prompt and text; what a restart finds done counts
    # too, so that their size, and with it every rounding, stays the same.
    prompts = [request.prompt for request in requests]
    prefix = common_prefix(prompts)
    longest = max(map(len, prompts), default=1) - len(prefix)
    most = max((request.max_new_tokens for request in requests), default=1)
    room, made_for = len(prefix) + longest + most, models.generator.module.config.max_positions
    if room > made_for:
        run.console.print(
            f"  prompts and texts may have {room} tokens together; the generator was made for "
            f"{made_for}"
        )
    return Engine(
        models.generator.module,
        models.sampling_params,
        adapter=adapter,
        slots=slots_of_a_process(settings, models.sampling_mesh, len(requests)),
        prompt_buckets=[b for b in settings.prompt_buckets if b < longest]
        + [min(b for b in settings.prompt_buckets if b >= longest)],
        max_new_tokens=most,
        eos_ids=models.generator.eos_ids,
        pad_id=models.generator.pad_id,
        seed=run.config.seed,
        prefix=prefix,
        mesh=models.sampling_mesh,
        repetition_penalty=any(request.repetition_penalty != 1 for request in requests),
        stop=settings.stop,
        decode=lambda tokens: models.generator.decode(list(tokens)),
        memory_limit_bytes=sampling_memory(settings),
    )


def _server(run: Run, models: Models, adapter: Any | None) -> ServerEngine | None:
    """The engine that samples on the config's server, where it names one."""
    settings = run.config.generator.server
    if not settings.url:
        return None
    if adapter is not None:
        raise UserError(
            "generator.server.url is set, but the server has the base model only and cannot sample "
            "with the trained adapter; leave the URL empty for this run"
        )
    return ServerEngine(
        settings.url,
        settings.model,
        encode=lambda text: models.generator.tokenizer(text, add_special_tokens=False)["input_ids"],
        seed=run.config.seed,
        cache=run.path("work", f"server{run.processes.suffix}.jsonl"),
        concurrency=settings.concurrency,
        retries=settings.retries,
        timeout=settings.timeout,
        stop=run.config.generator.stop,
    )


def _report(run: Run, rows: list[dict[str, Any]], texts: dict[tuple[str, int], str]) -> None:
    finished = collections.Counter(row["finished"] for row in rows)
    empty = sum(not text for text in texts.values())
    repetitive = sum(is_repetitive(text) for text in texts.values())
    near_ties = sum(row["near_ties"] for row in rows)
    run.console.print(
        f"  {len(rows)} texts, {sum(row['tokens'] for row in rows)} tokens; "
        f"{finished['length']} cut by length, {empty} empty, {repetitive} repetitive; "
        f"{near_ties} draws near a decision boundary"
    )
