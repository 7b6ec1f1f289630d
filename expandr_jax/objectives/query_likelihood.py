"""A generator's likelihood of a query given a passage: scores that a small retriever learns.

The generator is shown the passage and asked for a query; log p of the query's tokens, without an
end, is the passage's score. Which passage a query is likely after is what the generator knows of
relevance, and step A learns it by the divergence that `contrastive.kl_weight` weighs.

References:
    Alignment of a small retriever to a language model: Invar-RAG, arXiv 2411.07021. Passages scored
    by the query's likelihood: UPR, Sachan et al., arXiv 2204.07496, equation 3.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from expandr_jax.data.batches import TRAINING_LENGTHS
from expandr_jax.data.triples import Triple
from expandr_jax.expansion.prompts import Prompt
from expandr_jax.expansion.strategies import fitted_message
from expandr_jax.objectives.log_probs import response_log_probs
from expandr_jax.objectives.packing import Example, RowSize, pack
from expandr_jax.pair import GeneratorModel
from expandr_jax.sharding import batch_divisor, batch_sharding, device_put, on_mesh, replicated

LIKELIHOOD_PROMPT = Prompt(
    "Write a query for a search engine that the following passage answers.\n"
    "Passage: {document}\nQuery:",
    "UPR's request, arXiv 2204.07496, in words of our own",
)
LEAST_LENGTH, SHORT_QUERY = 64, 16  # Tokens of the shortest rows, and of queries of most rows.
CHARACTERS_A_TOKEN = 16  # A passage of more is cut before it is looked at.
TOKENS_AT_ONCE = 256  # Query tokens whose logits are in memory at once.


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
    """How queries are scored.

    Attributes:
        mean: A query's score is the mean over its tokens, and not their sum. A sum is log p(query |
            passage), which grows with the query: of long ones the best passage has all of the
            teacher's distribution, of short ones little. The mean, as in UPR, has one temperature
            suit all.
        prompt_length: Tokens of a prompt at most; longer passages lose their end.
        query_length: Tokens of a query at most; longer ones lose their end.
        tokens_per_batch: Rows times length of a batch; TPUs want more.
    """

    mean: bool = True
    prompt_length: int = 512
    query_length: int = 64
    tokens_per_batch: int = 2048


class QueryLikelihood:
    """Scores passages by a generator, on the mesh that the generator is on.

    Attributes:
        sizes: What rows may be padded to, a program each; their number does not grow with the data.
    """

    def __init__(self, model: GeneratorModel, settings: LikelihoodSettings):
        generator, mesh, limit = model.generator, model.dpo_mesh, settings.prompt_length
        self._generator, self._settings, self._mesh = generator, settings, mesh
        self._variables = {"params": model.generator_params}
        longest = limit + settings.query_length
        lengths = [n for n in TRAINING_LENGTHS if LEAST_LENGTH <= n < longest] + [longest]
        widths = sorted({min(SHORT_QUERY, settings.query_length), settings.query_length})
        self.sizes: list[RowSize] = [(n, width) for n in lengths for width in widths]
        scored = functools.partial(
            response_log_probs, generator.module, responses=1, chunk=TOKENS_AT_ONCE
        )
        self._program = jax.jit(
            on_mesh(mesh, scored),
            in_shardings=({"params": model.base_shardings}, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )
        self._chat = functools.lru_cache(2)(lambda text: generator.chat_ids(text, limit))

    def scores(
        self, triples: Sequence[Triple], advance: Callable[[int], None] = lambda _: None
    ) -> tuple[list[list[float]], int]:
        """The score of each triple's positives, then of its negatives; how many texts were cut.

        Args:
            triples: What is scored, in batches of their own.
            advance: Called with the number of passages scored since its last call.

        Raises:
            UserError: A text has a token that the model has no row for.
        """
        queries = self._generator.token_ids([triple.query for triple in triples])
        most, cut, examples = self._settings.query_length, 0, []
        for triple, query in zip(triples, queries, strict=True):
            cut += len(query) > most
            for passage in triple.passages:
                ids, whole = self._prompt(passage)
                cut += not whole
                examples.append(Example(ids, (query[:most],)))
        found = iter(self._log_probs(examples, advance).tolist())
        return [[next(found) for _ in triple.passages] for triple in triples], cut

    def _prompt(self, passage: str) -> tuple[list[int], bool]:
        """The ids of what is asked of a passage, and whether they show all of it."""
        most = CHARACTERS_A_TOKEN * self._settings.prompt_length
        message = fitted_message(
            LIKELIHOOD_PROMPT, passage, most, lambda text: not self._chat(text)[1]
        )
        ids, cut = self._chat(message)
        return ids, not cut and " ".join(passage.split()) in message

    def _log_probs(self, examples: Sequence[Example], advance: Callable[[int], None]) -> np.ndarray:
        """[examples] float32."""
        result, made = np.zeros(len(examples), np.float32), []
        by_size: dict[RowSize, list[int]] = {size: [] for size in self.sizes}
        for number, example in enumerate(examples):
            length, width = example.size
            fitting = (s for s in self.sizes if length <= s[0] and width <= s[1])
            by_size[next(fitting)].append(number)
        divisor, sharding = batch_divisor(self._mesh), batch_sharding(self._mesh)
        for size, numbers in by_size.items():
            rows = max(1, self._settings.tokens_per_batch // size[0] // divisor) * divisor
            for first in range(0, len(numbers), rows):
                part = numbers[first : first + rows]
                filled = part + part[:1] * (rows - len(part))
                batch = pack([examples[i] for i in filled], self._generator.pad_id, [size])
                made.append((part, self._program(self._variables, device_put(batch, sharding))))
        for part, (sums, tokens) in made:
            sums, tokens = (np.asarray(x)[: len(part), 0] for x in (sums, tokens))
            result[part] = sums / np.maximum(tokens, 1) if self._settings.mean else sums
            advance(len(part))
        return result
