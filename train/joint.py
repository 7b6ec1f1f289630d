"""ExpandR from beginning to end: `python -m train.joint --config=configs/X.py --workdir=DIR`.

One round: expand the training queries with the current generator; train the retriever on them
(step A); encode the corpus and rebuild the index; sample candidates, reward them and train the
generator by DPO (step B). Then choose settings on dev, score every system on test, export, report.
The same command again continues where it stopped.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.records import write_jsonl
from expandr_jax.data.training_data import TrainingData, prepare_data
from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, journaled, numbered
from expandr_jax.model_hashes import model_hashes
from expandr_jax.objectives.contrastive_batches import check_contrastive_batch, triple_examples
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.pair import Models, check_meshes, load_models
from expandr_jax.ranking.systems import System
from expandr_jax.report.run_report import results_table, write_report
from expandr_jax.runtime.run import Run
from expandr_jax.training.setup import check_batch_size
from expandr_jax.vectors.corpus import Corpus, encode_corpus
from train.benchmarks import evaluate_benchmarks
from train.evaluation import Trained, evaluate, systems_of_run
from train.expansions import run_expander
from train.export import export_run
from train.generator import train_generator
from train.launch import define_config, define_processes, define_workdir, launch, make_console
from train.negatives import mine_training_negatives
from train.preferences import make_preferences
from train.retriever import train_retriever


def train_joint(
    config: Mapping[str, Any] | Config, workdir: str | os.PathLike, console: Console
) -> dict[str, Any]:
    """Runs or continues the whole of ExpandR in a workdir.

    Args:
        config: As from configs/.
        workdir: Where everything goes, a directory or gs://BUCKET/DIRECTORY; see the file contract
            in docs/run.md.
        console: Where progress is shown.

    Returns:
        The contents of results.json.

    Raises:
        UserError: Something the user gave is wrong; what was done so far stays.
    """
    config = read_config(config)
    check_meshes(config.mesh)
    systems = systems_of_run(config)
    _check_server(config, systems)
    objective = OBJECTIVES[config.dpo.loss]
    run = Run(workdir, config, console)
    with run.phase("data"):
        data = prepare_data(run)
    qrels = data.collection.qrels
    console.print(
        f"  {len(data.collection.corpus)} documents; queries: {len(data.retriever_train)} train "
        f"the retriever, {len(data.generator_train)} the generator, {len(qrels['dev'])} dev, "
        f"{len(qrels['test'])} test"
    )
    _check_negatives(config, data)
    with run.phase("models"), run.progress("models loaded", 2) as advance:
        models = load_models(config, advance)
    run.check_models(model_hashes(models))
    check_contrastive_batch(
        config.contrastive,
        models.retriever,
        models.retriever_params,
        models.contrastive_mesh,
        len(data.retriever_train),
    )
    check_batch_size("dpo.batch_size", config.dpo.batch_size, models.dpo_mesh)

    retrievers: dict[str, Callable[[], tuple[Any, Corpus]]] = {}
    retrievers["zero-shot"] = _retriever(run, models, data, "zero-shot", models.retriever_params)
    negatives = _negatives(run, models, retrievers["zero-shot"], data, 0)
    if any("fine-tuned" in system.retrievers for system in systems):
        with run.phase("fine-tuned baseline"):
            params = _train(run, models, data, None, negatives, phase="fine-tuned", round_=0)
        retrievers["fine-tuned"] = _retriever(run, models, data, "fine-tuned", params)

    params, adapter = models.retriever_params, None
    adapters: dict[str, Any] = {"base": None}
    for round_ in range(config.rounds):
        before = f"round-{round_ - 1}" if round_ > 0 else "zero-shot"
        if round_ > 0:
            negatives = _negatives(run, models, retrievers[before], data, round_)
        with run.phase(f"expansions, round {round_}"):
            expander = run_expander(run, models, data, retrievers[before])
            expansions = _expand(run, expander, adapter, data, round_)
        with run.phase(f"retriever, round {round_}"):
            start = models.retriever_params if config.contrastive.restart else params
            params = _train(
                run,
                models,
                data,
                expansions,
                negatives,
                phase="retriever",
                round_=round_,
                start=start,
            )
        name = "expandr" if round_ == config.rounds - 1 else f"round-{round_}"
        retrievers[name] = _retriever(run, models, data, name, params)
        corpus = retrievers[name]()[1]
        make_preferences(run, models, expander, adapter, params, corpus, data, round_)
        with run.phase(f"{objective.phase}, round {round_}"):
            path = run.path(f"round-{round_}", objective.file)
            rows, dropped = objective.read(path, models.generator, config, own=True)
            run.reporter.say(objective.counted(len(rows), dropped))
            adapter = train_generator(run, models, adapter, rows, round_=round_)
        adapters["trained" if name == "expandr" else name] = adapter

    trained = Trained(retrievers, adapters)
    results = evaluate(run, models, data, trained)
    evaluate_benchmarks(run, models, trained, results["chosen"])

    def export() -> None:
        exports = [f"export/{name}" for name in ("retriever", "adapter", "generator")]
        whole = [run.seals.intact(name) for name in exports]
        export_run(
            run.workdir, config, models.retriever, params, adapter, advance, address=run.address
        )
        if not all(whole):
            run.seals.seal(*exports)

    with run.phase("export"), run.progress("models exported", 3) as advance:
        run.processes.once(export)
    with run.phase("report"), run.progress("pages written", 1) as advance:
        report = run.processes.once(lambda: run.where(write_report(run.workdir)))
        advance(1)
    console.print(results_table(results))
    console.print(f"report: {report}", soft_wrap=True)
    run.close()
    return results


def _check_server(config: Config, systems: Sequence[System]) -> None:
    """Refuses, before hours of work, a server that would have to sample with the adapter."""
    if not config.generator.server.url:
        return
    adapted = [system.name for system in systems if "trained" in system.generators]
    if config.rounds > 1 or adapted:
        raise UserError(
            "generator.server.url: the server has the base model only; set rounds to 1 and leave "
            f"{', '.join(adapted) or 'further rounds'} out of evaluation.systems, or empty the URL"
        )


def _check_negatives(config: Config, data: TrainingData) -> None:
    """Refuses, before the models are loaded, to train on negatives that are nowhere."""
    count = config.contrastive.negatives
    if not count or config.mining.per_query or any(map(data.negatives, data.retriever_train)):
        return
    raise UserError(
        f"contrastive.negatives is {count}, but no training query has a document that is judged "
        "wrong; set it to 0, or mine some with mining.per_query"
    )


def _negatives(
    run: Run,
    models: Models,
    retriever: Callable[[], tuple[Any, Corpus]],
    data: TrainingData,
    round_: int,
) -> dict[str, list[str]]:
    """Hard negatives of a round under the retriever that it begins with; none if not asked for.

    Where none are to be mined, they are those that the data name.
    """
    if not run.config.contrastive.negatives:
        return {}
    if not run.config.mining.per_query:
        return {query: data.negatives(query) for query in data.retriever_train}
    params, corpus = retriever()
    return mine_training_negatives(run, models, params, corpus, data, round_)


def _expand(
    run: Run, expander: Expander, adapter: Any, data: TrainingData, round_: int
) -> dict[tuple[str, int], str]:
    """Expansions of the retriever's training queries; writes round-R/expansions.jsonl."""
    config = run.config.expansion
    queries = {query: data.collection.queries[query] for query in data.retriever_train}
    journal = run.path("work", f"round-{round_}", "expansions.jsonl")
    strip = config.strip_train_lead_ins
    sample = journaled(expander, adapter, journal, f"expansions, round {round_}", strip)
    texts = numbered(expander.texts(queries, config.train_samples, sample))
    rows = (
        {
            "query_id": query,
            "split": "train",
            "system": "expandr",
            "sample": sample,
            "query": data.collection.queries[query],
            "expansion": text,
        }
        for (query, sample), text in sorted(texts.items())
    )
    path = run.path(f"round-{round_}", "expansions.jsonl")
    run.processes.once(lambda: write_jsonl(path, rows))
    return texts


def _train(
    run: Run,
    models: Models,
    data: TrainingData,
    expansions: dict[tuple[str, int], str] | None,
    negatives: dict[str, list[str]],
    *,
    phase: str,
    round_: int,
    start: Any | None = None,
) -> Any:
    """Step A on the training queries, expanded or plain: the trained retriever's parameters."""
    config = run.config
    # A sample has a text of each of the strategy's requests.
    samples = 1 + max((number for _, number in expansions or ()), default=-1)
    triples = [
        Triple(
            data.collection.queries[query],
            tuple(data.collection.corpus[document] for document in data.positives(query)),
            tuple(negatives.get(query, ())),
            tuple(filter(None, (expansions[query, sample] for sample in range(samples)))),
        )
        for query in data.retriever_train
    ]
    start = models.retriever_params if start is None else start
    return train_retriever(
        run,
        models,
        start,
        triple_examples(triples, models.encoder),
        config.contrastive,
        phase=phase,
        round_=round_,
        samples=samples,
        ids=data.retriever_train,
    )


def _retriever(
    run: Run, models: Models, data: TrainingData, name: str, params: Any
) -> Callable[[], tuple[Any, Corpus]]:
    """A function that encodes the corpus and builds its index the first time it is called."""
    made: list[Corpus] = []

    def build() -> tuple[Any, Corpus]:
        if not made:
            with run.phase(f"encode the corpus, {name}"):
                made.append(encode_corpus(run, models, data.collection.corpus, name, params))
        return params, made[0]

    return build


def main(_: Any) -> None:
    train_joint(flags.FLAGS.config, flags.FLAGS.workdir, make_console())


def define_flags() -> None:
    define_config()
    define_workdir()
    define_processes()


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
