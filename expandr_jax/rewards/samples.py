"""Fresh samples of both generators for dev and test queries, each judged by itself."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from expandr_jax.data.documents import rows_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.ranking.samples import RANK, REWARD
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.rewards import ranks as rewards
from expandr_jax.rewards.answers import Answers
from expandr_jax.rewards.registry import RewardSettings
from expandr_jax.rewards.search import judged_documents, measure_searches, vector_search
from expandr_jax.rewards.searches import REWARD_SEARCHES
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.query import EncodedQueries, fuse_each


def sample_rows(
    name: str,
    corpus: Corpus,
    data: TrainingData,
    encoded: Mapping[str, EncodedQueries],
    reward: RewardSettings,
    evaluation: EvaluationSettings,
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: a passage's rank of a relevant document, and its reward in the corpus.

    The former is of a search for the passage alone; the latter, where the config has it, is what
    the generator is trained for: `reward.corpus_measure` of a search for query and passage. It is
    there where `reward.search` is for vectors alone, as these searches are.

    Args:
        name: The system whose passages they are.
        corpus: As the system's retriever encodes it.
        data: Has the judgements.
        encoded: Split -> its queries with their passages.
        reward, evaluation: The sections of the config.
    """
    rows, normalize, answers = [], corpus.normalize, Answers(data.collection)
    depth = min(evaluation.sample_depth, len(corpus.ids))
    row_of, searched = rows_of(data.collection.corpus), REWARD_SEARCHES[reward.search]
    by_vectors_alone = searched.vectors and not searched.words
    for split, part in encoded.items():
        samples = part.expansions.shape[1]
        vectors = part.queries, part.expansions, part.present
        alone = fuse_each(*vectors, query_weight=0.0, normalize=normalize)
        _, found = corpus.evaluated.search(alone.reshape(-1, alone.shape[-1]), depth)
        drop = evaluation.drop_identical_ids
        judged = judged_documents(data, part.ids, row_of, split=split, drop_identical_ids=drop)
        documents = np.repeat(judged.documents, samples, axis=0)
        ranks = rewards.ranks_in_results(found, documents)
        first = np.where(part.present, rewards.best_rank(ranks).reshape(-1, samples), 0)
        values = {RANK: rewards.reciprocal_rank(first)}
        if reward.corpus > 0 and by_vectors_alone:
            fused = fuse_each(*vectors, query_weight=reward.query_weight, normalize=normalize)
            deep = reward.depth + judged.left_out.shape[1]
            search = vector_search(corpus.evaluated, fused, deep)
            how = reward.corpus_measure, reward.corpus_temperature, answers, reward.depth
            values[REWARD] = measure_searches(search, judged, samples, *how)
        rows += [
            {"query_id": query, "split": split, "system": name, "sample": sample}
            | {field: float(value[i, sample]) for field, value in values.items()}
            for i, query in enumerate(part.ids)
            for sample in range(samples)
        ]
    return rows
