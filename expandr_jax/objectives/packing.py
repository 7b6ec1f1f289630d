"""Prompts with their responses as rows of a batch: the prompt stands once, before all of them."""

import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from expandr_jax.data.batches import best_lengths, bucket_length
from expandr_jax.files.records import hash_json
from expandr_jax.models.generator import Generator

if TYPE_CHECKING:
    from expandr_jax.objectives.settings import DpoSettings

PADDING, PROMPT = -1, 0  # Segments of a row; its responses are 1, 2 and so on.
RowSize = tuple[int, int]  # Tokens of a row, and those of them that are its responses'.


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its responses.

    Attributes:
        prompt: The prompt's tokens.
        responses: Each response's tokens, with its one EOS.
        extras: Numbers that the loss needs of the example, by name.
        name: What messages call it.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    extras: Mapping[str, float] = dataclasses.field(default_factory=dict)
    name: str = dataclasses.field(default="", compare=False)

    @property
    def ids(self) -> list[list[int]]:
        """The ids of the prompt and of each response, as plain lists."""
        return [list(part) for part in (self.prompt, *self.responses)]

    @property
    def size(self) -> RowSize:
        """Tokens of its row, and those of them that are its responses'."""
        responses = sum(map(len, self.responses))
        return len(self.prompt) + responses, responses

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return self.size[0]

    @property
    def positions(self) -> int:
        """Tokens of the prompt with the longest response: all continue its positions."""
        return len(self.prompt) + max(map(len, self.responses))


def hash_response_examples(examples: Iterable[Example]) -> str:
    """sha256 over the ids and numbers of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        parts = (example.prompt, *example.responses)
        digest.update(hash_json([[len(part) for part in parts], dict(example.extras)]).encode())
        for part in parts:
            digest.update(np.asarray(part, np.int32).tobytes())
    return digest.hexdigest()


def tokenized(
    generator: Generator,
    prompt: str,
    responses: Sequence[str],
    settings: "DpoSettings",
    *,
    joined: bool = False,
) -> tuple["array[int]", list["array[int]"], int]:
    """Ids of a prompt's end and of each response's start, one EOS on each; how many were cut.

    Ids take 4 bytes each: lists of them would be gigabytes for 100,000 pairs. The limits are those
    of the config's section `dpo`.

    `joined`: tokens are those of the prompt with each response behind it, and the prompt ends where
    their ids or the prompt's own begin to differ, as in TRL; if that is at once, it ends where its
    text does. Responses that a model wrote are not joined: it had the prompt's own ids before them.
    """
    if joined:
        ids = generator.token_ids([prompt, *(prompt + response for response in responses)])
        columns = zip(*ids, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))
        ids = [ids[0][:shared], *(row[shared:] for row in ids[1:])]
    if not joined or not shared:
        ids = generator.token_ids([prompt, *responses])
    made = [generator.response_ids(part, settings.response_length) for part in ids[1:]]
    cut = (len(ids[0]) > settings.prompt_length) + sum(was_cut for _, was_cut in made)
    prompt_ids = array("i", ids[0][-settings.prompt_length :])
    return prompt_ids, [array("i", response) for response, _ in made], cut


def row_sizes(needed: Sequence[RowSize], most: int) -> list[RowSize]:
    """Sizes for `pack`, `most` of them or fewer, that rows are padded to with the least filling.

    Args:
        needed: (tokens of the longest row, of the most response tokens) of each batch.
        most: Sizes at most; each is a program to compile.
    """
    sizes = []
    for length in best_lengths([length for length, _ in needed], most):
        width = max(own for longest, own in needed if longest <= length)
        sizes.append((length, -(-width // 16) * 16))
    return sizes


def pack(
    examples: Sequence[Example], pad_id: int, sizes: Sequence[RowSize] = ()
) -> dict[str, np.ndarray]:
    """Arrays of a batch of examples, each in one row: the prompt, then its responses.

    Args:
        examples: All with the same names of `extras`.
        pad_id: Fills rows up.
        sizes: What rows may have, in rising order; a batch that fits none is padded to powers of
            two.

    Returns:
        "tokens", "positions", "segments" [batch, length]: all responses continue the prompt's
        positions. "sources", "targets", "responses" [batch, response tokens]: the position whose
        hidden state predicts each response token, the token, and its segment. int32. Each of the
        `extras`, [batch] float32.
    """
    needed = [example.size for example in examples]
    longest, widest = (max(column) for column in zip(*needed, strict=True))
    length, width = next(
        (size for size in sizes if longest <= size[0] and widest <= size[1]),
        (bucket_length(longest), bucket_length(widest)),
    )
    shape = len(examples), length
    batch = {name: np.zeros(shape, np.int32) for name in ("positions", "segments")}
    batch["tokens"] = np.full(shape, pad_id, np.int32)
    batch["segments"][:] = PADDING
    batch |= {name: np.zeros((len(examples), width), np.int32) for name in ("sources", "targets")}
    batch["responses"] = np.full((len(examples), width), PADDING, np.int32)
    for row, example in enumerate(examples):
        end = prompt = len(example.prompt)
        batch["tokens"][row, :prompt] = example.prompt
        batch["positions"][row, :prompt] = np.arange(prompt)
        batch["segments"][row, :prompt] = PROMPT
        for segment, response in enumerate(example.responses, start=PROMPT + 1):
            span = slice(end, end + len(response))
            batch["tokens"][row, span] = response
            batch["positions"][row, span] = prompt + np.arange(len(response))
            batch["segments"][row, span] = segment
            out = slice(end - prompt, end - prompt + len(response))
            batch["targets"][row, out] = response
            batch["responses"][row, out] = segment
            # The prompt's last token predicts the first token of each response.
            batch["sources"][row, out] = [prompt - 1, *range(end, end + len(response) - 1)]
            end += len(response)
    for name in examples[0].extras:
        batch[name] = np.array([example.extras[name] for example in examples], np.float32)
    return batch
