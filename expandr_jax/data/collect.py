"""The text a run trains and tests on, copied into its workdir so that the run explains itself."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

from expandr_jax.data.beir import (
    Collection,
    Qrels,
    corpus_key,
    read_beir,
    read_texts,
    source_hashes,
    write_beir,
)
from expandr_jax.data.benchmarks import benchmark_queries, query_key
from expandr_jax.data.documents import Documents, seal, write_documents
from expandr_jax.data.download import data_path
from expandr_jax.data.duplicates import near_duplicates
from expandr_jax.data.places import only_collection
from expandr_jax.data.pydoc import harvest
from expandr_jax.data.settings import DataSettings
from expandr_jax.data.training_data import TrainingData, limit_queries
from expandr_jax.errors import UserError
from expandr_jax.files.archive import Files
from expandr_jax.files.records import hash_json, write_json
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter

SPLITS = ("train", "dev", "test")


def prepare_data(config: DataSettings, checksums: Checksums, reporter: Reporter) -> TrainingData:
    """Reads data/ of a workdir, or makes it where it is not whole, as its checksums say.

    Its documents are read from a file of their own, made once, and no text of them is held.

    Args:
        config: The config's section `data`.
        checksums: Those of the workdir, whose first process writes. Beside data/, triples are
            prepared in work/prepared, unless the config says where, and documents kept in
            work/documents/data.
        reporter: Shows progress, and says what is left out.

    Raises:
        UserError: The source is missing, empty or malformed.
    """
    workdir, processes = checksums.workdir, checksums.processes
    directory, store = workdir / "data", workdir / "work" / "documents" / "data"

    def make() -> None:
        if not checksums.intact("data"):
            data = collect_data(config, workdir / "work" / "prepared", store, reporter)
            write_beir(directory, data.collection)
            trained = {"retriever_train": data.retriever_train,
                       "generator_train": data.generator_train}  # fmt: skip
            write_json(directory / "SOURCE.json", data.source | trained)
            checksums.record("data")
            corpus = data.collection.corpus
            if not (isinstance(corpus, Documents) and corpus.directory == store):
                write_documents(corpus.items(), store)
            seal(store, corpus_key(only_collection(directory)))

    processes.once(make)
    source = json.loads((directory / "SOURCE.json").read_text(encoding="utf-8"))
    if left_out := source["left_out_for_tests"]:
        nearly = source.get("nearly_tests", 0)  # Older runs counted none, and left none out.
        which = f" ({nearly} of them nearly)" if nearly else ""
        reporter.say(
            f"{left_out} training queries are left out: they are dev or test queries, too{which}"
        )
    if both := source.get("judged_in_both"):
        reporter.say(f"{both} documents are judged for training and for dev or test queries")
    collection = read_stored(only_collection(directory), store, processes)
    collection = dataclasses.replace(collection, name=source["name"])
    return TrainingData(collection, source["retriever_train"], source["generator_train"])


def read_stored(files: Files, store: pathlib.Path, processes: Processes) -> Collection:
    """`read_beir` in all processes, with a store in the workdir.

    Where that is one directory for all, process 0 alone reads the corpus and the store to see that
    they are whole.
    """
    trusted = processes.files.common and not processes.is_main
    return processes.main_first(lambda: read_beir(files, store=store, trusted=trusted))


def check_common(collection: Collection, place: pathlib.Path, processes: Processes) -> None:
    """Refuses a collection of which processes have read other queries or judgements.

    Where it lies, each may have a copy; of its documents all have process 0's, by `read_stored`.

    Args:
        collection: What this process has read; all call it together.
        place: Where that was, for the message.
        processes: They.
    """
    if processes.count == 1:
        return
    qrels = [[split, [*judged.items()]] for split, judged in collection.qrels.items()]
    judged = collection.queries, collection.answers, collection.excluded
    own = hash_json([[*map(list, part.items())] for part in judged] + qrels)
    if {*processes.gather(own)} != {own}:
        raise UserError(
            f"{place}: queries or judgements are not the same for all processes; copy it once more"
        )


def collect_data(
    config: DataSettings, prepared_in: pathlib.Path, store: pathlib.Path, reporter: Reporter
) -> TrainingData:
    """Reads what `data.kind` names, and divides its queries.

    Training queries that are dev or test queries, too, or queries of a further collection, are left
    out, and so are those nearly the same, as `near_duplicates` has it. Docstrings are divided here,
    by documents, so that of their own held-out queries equal ones alone are looked for.

    Args:
        config: The config's section `data`.
        prepared_in: Where triples are prepared, unless the config says where.
        store: Where documents are kept.
        reporter: Shows progress.

    Raises:
        UserError: The source is missing, empty or malformed.
    """
    others = benchmark_queries(config.tests)  # First: a path that leads nowhere is told at once.
    own_split = config.kind == "pydoc"
    if own_split:
        limits = {"min_pairs": config.min_pairs, "shares": config.shares}
        data = harvest(config.packages, **limits, reporter=reporter)
    elif config.kind == "beir":
        data = _read_collection(config, store, reporter)
    elif config.kind == "triples":
        # Imported where it is used: tensorflow-datasets takes a quarter of a second.
        from expandr_jax.data.echo import read_echo

        data = read_echo(config, prepared_in, store, reporter)
    else:
        raise UserError(f"data.kind is {config.kind!r}; expected 'pydoc', 'beir' or 'triples'")
    collection = data.collection
    held_out = [query for split in ("dev", "test") for query in collection.qrels[split]]
    tested = others | {query_key(text) for text in data.queries(held_out)}
    trained = [*data.retriever_train, *data.generator_train]
    left_out = {i for i in trained if query_key(collection.queries[i]) in tested}
    same = len(left_out)
    near = near_duplicates(data.queries(trained), sorted(others if own_split else tested))
    left_out |= {i for i, like in zip(trained, near, strict=True) if like}
    retriever, generator = (
        [i for i in ids if i not in left_out]
        for ids in (data.retriever_train, data.generator_train)
    )
    retriever = limit_queries(retriever, config.max_retriever_train)
    generator = limit_queries(generator, config.max_generator_train)
    keep = {
        "train": sorted([*retriever, *generator]),
        "dev": limit_queries(list(collection.qrels["dev"]), config.max_dev),
        "test": limit_queries(list(collection.qrels["test"]), config.max_test),
    }
    qrels = {
        split: {query: collection.qrels[split][query] for query in ids}
        for split, ids in keep.items()
    }
    used = {query: collection.queries[query] for ids in keep.values() for query in ids}
    answers = {query: own for query, own in collection.answers.items() if query in used}
    excluded = {query: own for query, own in collection.excluded.items() if query in used}
    kept = TrainingData(
        Collection(collection.name, collection.corpus, used, qrels, answers, excluded),
        retriever,
        generator,
        {
            **data.source,
            "left_out_for_tests": len(left_out),
            "nearly_tests": len(left_out) - same,
            "judged_in_both": _judged_in_both(collection.corpus, qrels),
        },
    )
    _check_parts(config.kind, kept)
    return kept


def check_added_tests(
    added: Sequence[str], directory: pathlib.Path, generated: Mapping[str, str]
) -> None:
    """Refuses test collections that come to a run which has trained on their queries, or nearly.

    Args:
        added: Their paths.
        directory: The workdir's data/. Where that is not made yet, such queries will be left out.
        generated: Further queries that the run has trained on, by id.

    Raises:
        UserError: There are such queries, or no such collections.
    """
    if not (directory / "SOURCE.json").exists():
        return
    tested = sorted(benchmark_queries(added))
    texts = {**dict(read_texts(only_collection(directory), "queries")), **generated}
    source = json.loads((directory / "SOURCE.json").read_text(encoding="utf-8"))
    trained = [*source["retriever_train"], *source["generator_train"], *generated]
    near = near_duplicates((texts[query] for query in trained), tested)
    if leaked := [query for query, like in zip(trained, near, strict=True) if like]:
        raise UserError(
            f"data.tests: this run has trained on {len(leaked)} queries of {', '.join(added)}, or "
            f"nearly so, as {leaked[0]}; use a new --workdir, where they are left out of training"
        )


def _judged_in_both(corpus: Mapping[str, str], qrels: Mapping[str, Qrels]) -> int:
    """How many documents are judged for training queries and for dev or test queries."""
    train, dev, test = ({d for of in qrels[s].values() for d in of} for s in SPLITS)
    return sum(document in corpus for document in train & (dev | test))


def _check_parts(kind: str, data: TrainingData) -> None:
    """Refuses data that would make the run fail late, or end with a table of zeros."""
    if not any(text.strip() for text in data.collection.corpus.values()):
        raise UserError(f"{kind} data: no document has a text")
    for split, judged in data.collection.qrels.items():
        source = f"qrels/{split}.tsv" if kind == "beir" else "the data"
        if not judged:
            way = f", or a larger data.shares.{split}"
            if split == "train":
                way = " that have a relevant document and are no dev or test queries"
            raise UserError(f"{kind} data: no {split} queries; expected some in {source}{way}")
        if not any(data.positives(query, split) for query in judged):
            raise UserError(
                f"{kind} data: no {split} query has a relevant document in the corpus; expected "
                f"grades above 0 of its documents in {source}"
            )
    for name in ("retriever", "generator"):
        if not getattr(data, f"{name}_train"):
            raise UserError(
                f"{kind} data: no queries to train the {name} on; expected a larger "
                f"data.shares.{name}_train, or more queries"
            )


def _read_collection(config: DataSettings, store: pathlib.Path, reporter: Reporter) -> TrainingData:
    path = data_path(config, reporter)
    files = only_collection(path)
    collection = read_beir(files, store=store)
    for split in ("train", "test"):
        if split not in collection.qrels:
            raise UserError(f"{path}/qrels/{split}.tsv: missing; training needs judgements")
    qrels = dict(collection.qrels)
    given = TrainingData(collection, [], [])
    train = [query for query in qrels["train"] if given.positives(query)]
    if "dev" not in qrels:
        dev = {query for query in train if _fraction(query, "dev") < config.shares.dev}
        qrels["dev"] = {query: qrels["train"][query] for query in sorted(dev)}
        train = [query for query in train if query not in dev]
    part = config.shares.generator_train
    part = part / (part + config.shares.retriever_train)
    generator = [query for query in train if _fraction(query, "generator") < part]
    taken = set(generator)
    retriever = [query for query in train if query not in taken]
    qrels["train"] = {query: qrels["train"][query] for query in train}
    source = {"name": collection.name, "files": source_hashes(files)}
    return TrainingData(dataclasses.replace(collection, qrels=qrels), retriever, generator, source)


def _fraction(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(f"{salt}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
