"""The queue of waiting requests, batched by prompt and by length."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from expandr_jax.generation.requests import Request

LOOKAHEAD = 64  # Prompts among which those of one length, and repeated ones, are sought.


def prompt_batches(
    requests: Iterable[Request],
    bucket: Callable[[Sequence[int]], int],
    size: Callable[[int], int],
) -> Iterator[tuple[int, list[list[Request]]]]:
    """Batches of prompts of one bucket: that of the one that waited longest, and others.

    Args:
        requests: All requests, which are read a little ahead.
        bucket: Padded length of a prompt.
        size: Prompts in a batch of that length.

    Yields:
        The bucket, and for each prompt the requests that continue it.
    """
    requests, groups = iter(requests), {}
    while True:
        # One more than is looked at, so that the requests of the last prompt are all there.
        while len(groups) <= LOOKAHEAD and (request := next(requests, None)) is not None:
            groups.setdefault(request.prompt, []).append(request)
        if not groups:
            return
        length = bucket(next(iter(groups)))
        same = [prompt for prompt in groups if bucket(prompt) == length]
        yield length, [groups.pop(prompt) for prompt in same[: size(length)]]
