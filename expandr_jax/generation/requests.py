"""What is asked of the sampling engine, and what it answers."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from expandr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to sample; its draws depend on the engine's seed, `id` and `sample` only.

    Attributes:
        id: The query's id, or any name.
        sample: Index of this text among those of the same id.
        prompt: Token ids, chat template included; or the user's message, which `Sampler` turns
            into them.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Probability mass that is sampled from, in (0, 1].
        max_new_tokens: Most tokens to sample, EOS included.
        top_k: Number of tokens that are sampled from; 0 means all.
        min_p: Least probability relative to the likeliest token's, in [0, 1].
        repetition_penalty: Above 1 makes tokens of the prompt and of the text so far less likely.

    Raises:
        UserError: If a setting is out of its range or the prompt is empty.
    """

    id: str
    sample: int
    prompt: tuple[int, ...] | str
    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        expected = {
            "prompt": (self.prompt != (), "at least one token"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "max_new_tokens": (self.max_new_tokens > 0, "1 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (right, range_) in expected.items():
            if not right:
                raise UserError(
                    f"request {self.id!r}: {name} is {getattr(self, name)}; expected {range_}"
                )

    @property
    def stream(self) -> int:
        """32 bits that set this id's draws apart, the same in every process."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
        id: The request's.
        sample: The request's.
        tokens: Sampled ids, with the EOS that ended them if one did.
        finished: "eos", "length", "stop" (a stop string) or "refused" (a server's, whose text is
            empty).
        near_ties: Draws so close to another outcome that a rounding error could change them.
        first_near_tie: Index of the first of them: tokens before it are the same on any platform
            whose logits agree to rounding. None if there is none.
        text: What comes before the stop string, where the engine has any.
        log_probs: For each of `tokens`, where the engine keeps them: its log-probability in the
            softmax of the model's logits over the request's temperature (of the logits as they are
            where that is 0), before top-k, top-p, min-p and penalties. It is what a training pass
            at that temperature computes for the policy that sampled.
    """

    id: str
    sample: int
    tokens: tuple[int, ...]
    finished: str
    near_ties: int
    first_near_tie: int | None = None
    text: str | None = None
    log_probs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Requests:
    """What is asked for many queries: a query's requests are made whenever they are looked at.

    Attributes:
        ids: The queries' ids, each once.
        counts: How many requests each has.
        make: A query's id to its requests.
    """

    ids: Sequence[str]
    counts: Sequence[int]
    make: Callable[[str], Sequence[Request]]

    @classmethod
    def of(cls, requests: Iterable[Request]) -> "Requests":
        """Wraps a list of requests."""
        if isinstance(requests, cls):
            return requests
        made: dict[str, list[Request]] = {}
        for request in requests:
            made.setdefault(request.id, []).append(request)
        return cls([*made], [*map(len, made.values())], made.__getitem__)

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[Request]:
        for query in self.ids:
            yield from self.make(query)

    def share(self, index: int, count: int) -> "Requests":
        """The requests of queries `index`, `index + count`, ...: a query's prompt is run once."""
        own = slice(index, None, count)
        return dataclasses.replace(self, ids=self.ids[own], counts=self.counts[own])


@dataclasses.dataclass(frozen=True)
class Extent:
    """What an engine is made for: what it must know of all requests before it runs the first.

    Attributes:
        count: How many there are.
        most: Longest text that one asks for, in tokens.
        penalty: Whether one has a repetition penalty.
        shortest, longest: Tokens of prompts.
        ends: The first and the last prompt in the order of their ids; none without requests.
    """

    count: int = 0
    most: int = 1
    penalty: bool = False
    shortest: int = 1
    longest: int = 1
    ends: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, requests: Iterable[Request]) -> "Extent":
        """The extent of requests whose prompts are ids, each of which is read once."""
        return cls.joined(
            cls(
                1,
                request.max_new_tokens,
                request.repetition_penalty != 1,
                len(request.prompt),
                len(request.prompt),
                (tuple(request.prompt),) * 2,
            )
            for request in requests
        )

    @classmethod
    def joined(cls, extents: Iterable["Extent"]) -> "Extent":
        """The extent of the requests of several extents together."""
        return functools.reduce(cls._with, extents, cls())

    def _with(self, other: "Extent") -> "Extent":
        if not (self.count and other.count):
            return self if self.count else other
        return Extent(
            self.count + other.count,
            max(self.most, other.most),
            self.penalty or other.penalty,
            min(self.shortest, other.shortest),
            max(self.longest, other.longest),
            (min(self.ends[0], other.ends[0]), max(self.ends[1], other.ends[1])),
        )

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that all prompts begin with, short of the last token of the shortest."""
        if not self.ends:
            return ()
        # What the first and the last in order share, all between them share too.
        first, last = self.ends
        end = self.shortest - 1
        count = next((i for i in range(end) if first[i] != last[i]), end)
        return first[:count]


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all of some prompts begin with, as `Extent.prefix` has them."""
    if not prompts:
        return ()
    lengths = [*map(len, prompts)]
    ends = tuple(min(prompts)), tuple(max(prompts))
    return Extent(len(prompts), shortest=min(lengths), longest=max(lengths), ends=ends).prefix
