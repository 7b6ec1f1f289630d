"""Waiting requests, brought together by prompt and by length."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from expandr_jax.generation.requests import Request

LOOKAHEAD = 64  # Prompts among which those of one length, and repeated ones, are sought.


@dataclasses.dataclass
class PromptGroup:
    """Requests that continue the same prompt."""

    prompt: Sequence[int]
    requests: list[Request]


class PromptQueue:
    """Reads requests a little ahead and hands them out in batches of prompts of one bucket."""

    def __init__(
        self,
        requests: Iterator[Request],
        bucket: Callable[[Sequence[int]], int],
        size: Callable[[int], int],
    ):
        """Reads the first requests.

        Args:
            requests: All requests.
            bucket: Padded length of a prompt.
            size: Prompts in a batch of that length.
        """
        self._requests = requests
        self._bucket, self._size = bucket, size
        self._groups: collections.OrderedDict[Sequence[int], PromptGroup] = (
            collections.OrderedDict()
        )
        self._fill()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self) -> tuple[int, list[PromptGroup]]:
        """Removes the prompt that waited longest, and others of its bucket: (bucket, groups)."""
        bucket = self._bucket(next(iter(self._groups)))
        same = [prompt for prompt in self._groups if self._bucket(prompt) == bucket]
        groups = [self._groups.pop(prompt) for prompt in same[: self._size(bucket)]]
        self._fill()
        return bucket, groups

    def _fill(self) -> None:
        # One more than is looked at, so that the requests of the last prompt are all there.
        while len(self._groups) <= LOOKAHEAD:
            request = next(self._requests, None)
            if request is None:
                return
            group = self._groups.setdefault(request.prompt, PromptGroup(request.prompt, []))
            group.requests.append(request)
