"""Samples texts from an OpenAI-compatible completion server, as vLLM, SGLang and llama.cpp run."""

import concurrent.futures
import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, hash_json
from expandr_jax.generation.requests import Completion, Request
from expandr_jax.generation.settings import ServerSettings
from expandr_jax.weights.fields import is_count

API_KEY_VARIABLE = "EXPANDR_SERVER_KEY"  # In the environment; no paid service's name.
RETRIED = (408, 425, 429)  # Besides all of 500 and above.
LONGEST_DELAY = 60.0
LONGEST_WAIT = 600.0  # However much longer a server asks for.
# What ends a text; TGI has the last two. All else, as abort, error or nothing, is no end.
ENDS = {"stop": "eos", "length": "length", "eos_token": "eos", "stop_sequence": "eos"}
# How servers say that a prompt has more tokens than they take.
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|(?:prompt|input)\W.*too long"
    r"|inputs`? .*must (?:be <=|have less)",
    re.IGNORECASE,
)
SHOWN_CHARACTERS = 200  # Characters of a server's complaint.


class _Failure(Exception):
    """A failure that may be retried, after the pause that the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


def retry_delay(seed: int, key: str, attempt: int, first: float) -> float:
    """Seconds to wait after `attempt` tries of a request: up to `first`, then doubled each time.

    It is between half of and all of min(first * 2^(attempt - 1), 60), fixed by seed, key and
    attempt.
    """
    jitter = random.Random(f"{seed}/{attempt}/{key}").random()
    return min(first * 2.0 ** (attempt - 1), LONGEST_DELAY) * (0.5 + 0.5 * jitter)


def _pause(wish: str | None) -> float:
    """Seconds that a Retry-After header, a number or a date, asks for; 0 without one."""
    with contextlib.suppress(TypeError, ValueError):
        if not wish or wish.strip().isdigit():
            return min(float(wish or 0), LONGEST_WAIT)
        until = email.utils.parsedate_to_datetime(wish)
        return min(max(0.0, until.timestamp() - time.time()), LONGEST_WAIT)
    return 0.0


def _tokens_read(answer: dict[str, Any], sent: int) -> int:
    """How many of a prompt's tokens the server says that it read; all where it does not say."""
    usage = answer.get("usage") or {}
    count, cached = usage.get("prompt_tokens"), usage.get("prompt_tokens_details") or {}
    if not is_count(count, 1, 2**31) or count + (cached.get("cached_tokens") or 0) == sent:
        return sent  # Some count what they had from another request apart.
    return count


def _is_usable(url: str) -> bool:
    """Whether this is a web address, without a name and a password that would be shown with it."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in url
    except ValueError:
        return False


class ServerEngine:
    """Continues prompts on a server; used as `Engine` is.

    Prompts go as token ids, so that the server applies no template. What a server answers to a seed
    is its own affair: texts are not those of `Engine`, and near ties are not counted. A finished
    text is on disk before it is yielded, and is not asked for again.

    An API key is read from the environment variable EXPANDR_SERVER_KEY, if there is one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        encode: Callable[[str], Sequence[int]],
        seed: int,
        cache: str | os.PathLike,
        concurrency: int = 32,
        retries: int = 6,
        timeout: float = 600.0,
        first_delay: float = 1.0,
        stop: Sequence[str] = (),
    ):
        """Opens the cache; nothing is sent yet.

        Args:
            url, model, concurrency, retries, timeout: The settings of generator.server.
            encode: Text to token ids, without special tokens.
            seed: Seed of all draws; a request's own follows from it, its id and its sample.
            cache: File of finished texts; it stays at its name with ".part".
            first_delay: As of `retry_delay`.
            stop: Strings that end a text; they are left out of it.

        Raises:
            UserError: The URL or the key cannot be used, or the cache cannot be read.
        """
        if not _is_usable(url):
            raise UserError(
                "the completion server's URL cannot be used; expected http://HOST:PORT/v1, and the "
                f"key in the environment variable {API_KEY_VARIABLE}"
            )
        self._settings = ServerSettings(url, model, concurrency, retries, timeout)
        self._url = url.rstrip("/")
        self._encode, self._seed, self._first_delay = encode, seed, first_delay
        self._stop = list(stop)
        self._headers = {"Content-Type": "application/json"}
        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        if self._key:
            if not (self._key.isascii() and self._key.isprintable()):
                raise UserError(f"{API_KEY_VARIABLE}: has characters that no header can hold")
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._journal = Journal(cache)
        # Texts stay on disk.
        self._kept = {row["key"]: number for number, row in enumerate(self._journal.rows)}

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions of requests, in the order in which the server gets on with them.

        A prompt that is too long for it has a completion without a text, finished by "refused".

        Raises:
            UserError: The server refuses a request for another reason, or fails more often than
                the settings allow.
        """
        stopped, at_once = threading.Event(), self._settings.concurrency
        pool = concurrent.futures.ThreadPoolExecutor(at_once)
        running: dict[concurrent.futures.Future, Request] = {}
        try:
            for request in requests:
                body = self._body(request)
                number = self._kept.get(hash_json(body))
                if number is not None:
                    yield self._completion(request, self._journal.rows[number])
                    continue
                running[pool.submit(self._ask, request, body, stopped)] = request
                if len(running) >= 2 * at_once:
                    yield from self._finished(running)
            while running:
                yield from self._finished(running)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def _finished(self, running: dict[concurrent.futures.Future, Request]) -> Iterator[Completion]:
        """Waits for at least one request; those that are done leave `running`."""
        done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        # Texts that came back beside a failure are kept before it is raised.
        rows = [future.result() for future in done if future.exception() is None]
        rows = [row for row in rows if row["finished"] != "refused"]  # The server may change.
        before = len(self._journal.rows)
        self._journal.append(rows)
        self._kept |= {row["key"]: number for number, row in enumerate(rows, start=before)}
        for future in done:
            yield self._completion(running.pop(future), future.result())

    def _completion(self, request: Request, row: dict[str, str]) -> Completion:
        tokens = tuple(self._encode(row["text"]))
        return Completion(request.id, request.sample, tokens, row["finished"], 0, text=row["text"])

    def _body(self, request: Request) -> dict[str, Any]:
        digest = hashlib.sha256(f"{self._seed}/{request.sample}/{request.id}".encode()).digest()
        body = {
            "model": self._settings.model,
            "prompt": list(request.prompt),
            "temperature": request.temperature,
            "max_tokens": request.max_new_tokens,
            "seed": int.from_bytes(digest[:4], "big") >> 1,
            # All are said: servers have defaults of their own, or take them from the model's files.
            "top_p": request.top_p,
            "top_k": request.top_k or -1,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "repeat_penalty": request.repetition_penalty,  # llama.cpp's name for it.
        }
        if request.repetition_penalty != 1:
            body["repeat_last_n"] = -1  # llama.cpp looks at the last 64 tokens alone otherwise.
        if self._stop:
            body["stop"] = self._stop
        return body

    def _ask(
        self, request: Request, body: dict[str, Any], stopped: threading.Event
    ) -> dict[str, str]:
        """The cache's row of a request, after as many tries as it takes."""
        key, data = hash_json(body), json.dumps(body).encode()
        reason, pause = "stopped", 0.0
        for attempt in range(self._settings.retries + 1):
            delay = retry_delay(self._seed, key, attempt, self._first_delay) if attempt else 0.0
            if stopped.wait(max(delay, pause)):
                break
            try:
                return {"key": key, **self._post(data, len(request.prompt))}
            except _Failure as failure:
                reason, pause = str(failure), failure.pause
        raise UserError(
            f"{self._url}: no text for request {request.id!r}, sample {request.sample}, after "
            f"{self._settings.retries + 1} tries; the last: {reason}"
        )

    def _post(self, data: bytes, sent: int) -> dict[str, str]:
        """One try with a prompt of `sent` tokens: the text, and why it ended."""
        request = urllib.request.Request(f"{self._url}/completions", data, self._headers)
        try:
            with self._opener.open(request, timeout=self._settings.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            content = b""
            with contextlib.suppress(OSError, http.client.HTTPException), error:
                content = error.read()
            complaint = f"HTTP status {error.code}: {self._shown(content)}"
            if error.code in RETRIED or error.code >= 500:
                raise _Failure(complaint, _pause(error.headers.get("Retry-After"))) from None
            if error.code == 413 or (error.code in (400, 422) and _TOO_LONG.search(complaint)):
                return {"text": "", "finished": "refused"}
            raise UserError(f"{self._url}: refused a request with {complaint}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _Failure(f"{type(reason).__name__} {reason}".strip()) from None
        try:
            answer = json.loads(content)
            # Some say so of an error with the status of success.
            if "choices" not in answer and _TOO_LONG.search(self._shown(content)):
                return {"text": "", "finished": "refused"}
            choice = answer["choices"][0]
            text = choice["text"].encode(errors="replace").decode()  # No unpaired surrogates.
            end = choice["finish_reason"]
            read = _tokens_read(answer, sent)
        except (ValueError, LookupError, TypeError, AttributeError):
            what = f"an answer that is not a completion: {self._shown(content)}"
            raise _Failure(what) from None
        if read < sent:  # Some cut what is too long, and continue another text.
            return {"text": "", "finished": "refused"}
        if read > sent:
            raise UserError(
                f"{self._url}: read a prompt of {sent} tokens as {read}: it adds some of its own"
            )
        if end not in tuple(ENDS):  # It may be anything that JSON can say.
            raise _Failure(f"a text that is not complete: its finish_reason is {end!r}")
        return {"text": text, "finished": ENDS[end]}

    def _shown(self, content: bytes) -> str:
        """The beginning of what the server says, on one line and without the key."""
        text = " ".join(content.decode(errors="replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:SHOWN_CHARACTERS]
