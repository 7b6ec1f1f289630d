"""Waiting requests, brought together by prompt and by length."""

from collections.abc import Callable, Iterator, Sequence

from expandr_jax.generation.requests import Request

LOOKAHEAD = 64  # Prompts among which those of one length, and repeated ones, are sought.


class PromptQueue:
    """Reads requests a little ahead and hands them out in batches of prompts of one bucket.

    Args:
        requests: All requests; the first are read at once.
        bucket: Padded length of a prompt.
        size: Prompts in a batch of that length.
    """

    def __init__(
        self,
        requests: Iterator[Request],
        bucket: Callable[[Sequence[int]], int],
        size: Callable[[int], int],
    ):
        self._requests = requests
        self._bucket, self._size = bucket, size
        self._groups: dict[Sequence[int], list[Request]] = {}
        self._fill()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self) -> tuple[int, list[list[Request]]]:
        """Removes the prompt that waited longest, and others of its bucket.

        Returns:
            The bucket, and for each prompt the requests that continue it.
        """
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
            self._groups.setdefault(request.prompt, []).append(request)
