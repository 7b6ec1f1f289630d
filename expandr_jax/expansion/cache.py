"""Generated texts that are kept: none is made twice by the same model for the same request."""

import contextlib
import dataclasses
import fcntl
import pathlib
from collections.abc import Iterator, Sequence

from expandr_jax.data.records import hash_json, read_jsonl, write_jsonl
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Prompt, sample_texts
from expandr_jax.expansion.prompts import strip_lead_in
from expandr_jax.pair import Models
from expandr_jax.runtime.run import Run

FIELDS = {"query_id": str, "sample": int, "prompt": str, "text": str}
_HASH_LENGTH = 16  # Hex digits.
Key = tuple[str, int, str]  # Query id, sample, hash of the prompt and of how it is answered.


class TextCache:
    """Texts on disk, a file for each strategy, model and seed, a line for each request.

    A text depends on the model's weights, the seed, the strategy, stop strings, the prompt with its
    temperature and lengths, the query's id and the number of the sample; all of them are looked up.

    Args:
        directory: Where the files are; several workdirs may share it.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def texts(
        self, run: Run, models: Models, name: str, prompts: Sequence[Prompt], phase: str
    ) -> dict[tuple[str, int], str]:
        """The texts of some requests; those that are not kept yet are generated and kept.

        Args:
            run: Seed, settings of the engine, progress.
            models: The generator.
            name: Of the strategy; sets its draws apart from others'.
            prompts: The requests, each (query_id, sample) once.
            phase: What generating them is called in timings.json.

        Returns:
            (query id, sample) -> text without its lead-in; "" where the model said nothing.

        Raises:
            UserError: The directory cannot be written, or a file in it is damaged.
        """
        stop = run.config.generator.stop
        owner = hash_json([models.generator_hash, run.config.seed, name, *stop])[:_HASH_LENGTH]
        path = self._directory / f"{name}-{owner}.jsonl"
        keys = [_key(prompt) for prompt in prompts]
        with self._locked(path, run):
            kept = _read(path)
            missing = [p for p, key in zip(prompts, keys, strict=True) if key not in kept]
            if missing:
                with run.phase(phase):
                    kept |= self._generate(run, models, name, path, missing)
                write_jsonl(
                    path,
                    (
                        {**dict(zip(FIELDS, key, strict=False)), "text": text}
                        for key, text in sorted(kept.items())
                    ),
                )
                self._journal(path, missing).unlink(missing_ok=True)
        if len(missing) < len(prompts):
            run.console.print(f"  {len(prompts) - len(missing)} texts of {name} were there already")
        return {key[:2]: strip_lead_in(kept[key]).strip() for key in keys}

    def _generate(
        self, run: Run, models: Models, name: str, path: pathlib.Path, missing: Sequence[Prompt]
    ) -> dict[Key, str]:
        journal = self._journal(path, missing)
        made = sample_texts(run, models, None, missing, path=journal, purpose=name, strip=False)
        return {_key(prompt): made[prompt.query_id, prompt.sample] for prompt in missing}

    def _journal(self, path: pathlib.Path, missing: Sequence[Prompt]) -> pathlib.Path:
        """Where the same requests go on from after a kill."""
        which = hash_json([dataclasses.astuple(prompt) for prompt in missing])[:_HASH_LENGTH]
        return path.with_suffix(f".{which}.new")

    @contextlib.contextmanager
    def _locked(self, path: pathlib.Path, run: Run) -> Iterator[None]:
        """Keeps other processes from generating the same."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError(
                f"{self._directory}: texts cannot be kept there: {error.strerror}"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                run.console.print(f"  another process writes {path}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _key(prompt: Prompt) -> Key:
    asked = [prompt.text, prompt.temperature, prompt.top_p, prompt.max_new_tokens]
    rest = [prompt.top_k, prompt.min_p, prompt.repetition_penalty]
    if rest != [0, 0.0, 1.0]:  # Left out where they change nothing, so that kept texts still serve.
        asked += rest
    return prompt.query_id, prompt.sample, hash_json(asked)[:_HASH_LENGTH]


def _read(path: pathlib.Path) -> dict[Key, str]:
    if not path.exists():
        return {}
    rows = (row for _, row in read_jsonl(path, FIELDS))
    return {(row["query_id"], row["sample"], row["prompt"]): row["text"] for row in rows}
