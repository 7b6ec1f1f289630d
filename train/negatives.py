"""Hard negatives for a run's step A: mined by its retrievers, or named by its data."""

from collections.abc import Mapping, Sequence

from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.sampled import MadeWhenAsked
from expandr_jax.files.named_rows import NamedRows
from expandr_jax.objectives.negatives import mine_triples
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever


def training_negatives(
    run: Run,
    retriever: CorpusRetriever,
    data: TrainingData,
    ids: Sequence[str],
    directory: str,
    what: str,
) -> Mapping[str, list[str]]:
    """Hard negatives of some training queries; none if the config asks for none.

    Where they are to be mined, the corpus is searched for each query, unexpanded, by the retriever
    that training begins with, in a phase for `what`, and a directory of the workdir gets a
    triples.jsonl; where not, they are those that the data name.

    Returns:
        Query id -> texts of its negatives, hardest first; read when they are asked for.
    """
    if not run.config.contrastive.negatives:
        return {}
    if not run.config.mining.per_query:
        return MadeWhenAsked(dict.fromkeys(ids), data.negatives)
    name = f"{directory}/triples.jsonl"
    if not run.checksums.intact(name):
        _ = retriever.corpus  # All processes encode it, as a phase of its own.
        with run.phase(f"hard negatives, {what}"):
            drop = run.config.evaluation.drop_identical_ids
            mine_triples(run.config.mining, drop, retriever, data, ids, run.path(name))
        retriever.release()
        run.checksums.record(name)
    rows = NamedRows(run.path(name), "query_id", {"neg": list})
    return MadeWhenAsked(rows, lambda query: rows[query]["neg"])
