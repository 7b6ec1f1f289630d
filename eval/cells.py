"""Cells of a table over collections and seeds: what it needs of one run, in one small file.

NAME-seed-S.json.gz is JSON with the fields of `Cell`; whoever has Python's standard library alone
can compute the means of results.json from its `values`.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from eval.checks import contradictions, read_object, read_results, read_timings
from expandr_jax.data.beir import read_texts
from expandr_jax.data.places import only_collection
from expandr_jax.errors import UserError
from expandr_jax.files.records import differences, read_jsonl, write_bytes
from expandr_jax.metrics import METRICS
from expandr_jax.ranking.gate_features import BEFORE
from expandr_jax.ranking.systems import OURS, System, parse_system
from expandr_jax.report.grid import COSTS, DIGITS, Measured
from expandr_jax.report.page import clip
from expandr_jax.runtime.formats import FORMAT, read_record, translated

MOST_BYTES = 200_000  # A file's.
SUFFIX = ".json.gz"
_TEXT_CHARACTERS = 240
# Settings that decide how fast a run is, and results up to rounding.
HOW = (
    "contrastive.micro_batch", "contrastive.remat", "generator.memory_limit", "generator.remat",
    "generator.slots", "generator.today", "keep", "log", "mesh", "retriever.tokens_per_batch",
)  # fmt: skip
# Settings that say where something lies, which is elsewhere for others: by their last part alone.
PATHS = (
    "data.cache", "data.dev", "data.path", "data.prepared", "data.tests",
    "evaluation.rerank.source", "generator.shape", "generator.source", "retriever.shape",
    "retriever.source",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a table needs of the run of one collection and seed.

    Attributes:
        collection, seed: Which it is.
        revision: The code that began the run: a commit, or the version of the package.
        format: The number of the config's format.
        config: Every setting; of paths, the last part.
        versions: The libraries'.
        device: What the run was begun on.
        source: Where the data came from, with checksums.
        results: results.json.
        timings: timings.json.
        queries: Ids of the test queries, which the following lists are in the order of.
        texts: The queries.
        writer: Whose `expansions` these are, as of `System.writer`; "": nobody's.
        expansions: The beginning of a passage for each query.
        values: System -> metric -> a value for each query.
        costs: System -> "tokens_per_query" and "seconds_per_query", None where nobody knows.
    """

    collection: str
    seed: int
    revision: str
    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    device: dict[str, Any]
    source: dict[str, Any]
    results: dict[str, Any]
    timings: dict[str, Any]
    queries: list[str]
    texts: list[str]
    writer: str
    expansions: list[str]
    values: dict[str, dict[str, list[float]]]
    costs: dict[str, dict[str, float | None]]

    @property
    def name(self) -> str:
        """The name of the cell's file, without the suffix."""
        return f"{self.collection}-seed-{self.seed}"

    def without_texts(self) -> "Cell":
        """The cell for others where queries, or what was written for them, may not be handed on."""
        texts = [""] * len(self.texts)
        return dataclasses.replace(self, texts=texts, writer="", expansions=[])


def other_settings(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that decide results and are not the same in two configs, with both values."""
    return [
        (name, before, now)
        for name, before, now in differences(one, two)
        if not f"{name}.".startswith(tuple(f"{how}." for how in HOW))
    ]


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON has it, with the last part alone of what says where something lies."""
    config = json.loads(json.dumps(config))
    for setting in PATHS:
        *sections, name = setting.split(".")
        section = config
        for part in sections:
            section = section.get(part, {})
        if name in section:
            section[name] = _last_part(section[name])
    if data := config.get("data"):  # A collection is the same from a directory and from an address.
        data["path"] = data.get("path") or _last_part(data.get("url", ""))
        data |= {"url": "", "md5": "", "sha256": ""}
    return config


def _last_part(value: Any) -> Any:
    if isinstance(value, list):
        return [_last_part(item) for item in value]
    if not isinstance(value, str) or not value or value.startswith("package:"):
        return value
    return pathlib.Path(value).absolute().name.removesuffix(".zip")


def cell_of_run(workdir: pathlib.Path, collection: str, test: str = "") -> Cell:
    """The cell of a finished run.

    Args:
        workdir: The run.
        collection: What the cell is called.
        test: A collection of data.tests whose results it has; "": the run's own.

    Raises:
        UserError: A file of the run cannot be read.
    """
    config = read_record(workdir / "config.json")
    record, timings = read_object(workdir / "config.json"), read_timings(workdir / "timings.json")
    source, folder = read_object(workdir / "data" / "SOURCE.json"), f"tests/{test}" if test else ""
    results, qrels, values = read_results(workdir, folder)
    own, queries, systems = workdir / folder, sorted(qrels), [*values]
    written = _by_leaf(own / "evaluation" / "expansions.jsonl", {"expansion": str})
    tokens = _by_leaf(own / "evaluation" / "tokens.jsonl", {"tokens": int})
    shown = OURS if OURS in written else next(iter(written), "")
    first = {row["query_id"]: row["expansion"] for row in reversed(written.get(shown, []))}
    if test:  # Its own files may be elsewhere by now.
        texts = {row["query_id"]: row.get("query", "") for of in written.values() for row in of}
    else:
        texts = dict(read_texts(only_collection(workdir / "data"), "queries"))
    return Cell(
        collection=collection,
        seed=config["seed"],
        revision=record.get("revision", "unknown"),
        format=FORMAT,
        config=without_places(config),
        versions=record["versions"],
        device=record.get("device", {}),
        source={n: v for n, v in source.items() if n not in ("retriever_train", "generator_train")},
        results=results,
        timings=timings,
        queries=queries,
        texts=[texts.get(query, "") for query in queries],
        writer=parse_system(shown).writer if shown else "",
        expansions=[clip(first.get(q, ""), _TEXT_CHARACTERS) for q in queries] if shown else [],
        values={
            system: {m: np.round(of, DIGITS).tolist() for m, of in values[system].items()}
            for system in systems
        },
        costs=_costs(
            systems, results, {} if test else timings, tokens, _expanded(own), len(queries)
        ),
    )


def _by_leaf(path: pathlib.Path, fields: Mapping[str, type]) -> dict[str, list[dict[str, Any]]]:
    """Leaf -> its rows of a file of evaluation/; none of a file that an older run has not."""
    rows = collections.defaultdict(list)
    if path.exists():
        for _, row in read_jsonl(path, {"query_id": str, "split": str, "system": str, **fields}):
            rows[row["system"]].append(row)
    return dict(rows)


def _expanded(workdir: pathlib.Path) -> dict[str, set[str]]:
    """Gate -> the test queries that it expands; of a run without gates, none."""
    path = workdir / "evaluation" / "gated.jsonl"
    found = collections.defaultdict(set)
    if path.exists():
        for _, row in read_jsonl(path, {"query_id": str, "system": str, "expanded": bool}):
            if row["expanded"]:
                found[row["system"]].add(row["query_id"])
    return found


def _costs(
    systems: Sequence[str],
    results: Mapping[str, Any],
    timings: Mapping[str, Any],
    generated: Mapping[str, Sequence[Mapping[str, Any]]],
    expanded: Mapping[str, Container[str]],
    queries: int,
) -> dict[str, dict[str, float | None]]:
    """What each system takes for a test query: tokens that are generated, and seconds.

    Seconds are those of its tokens, at the rate of all that were generated for evaluation, and of
    its searches with what they rest on; `generated` are the rows of evaluation/tokens.jsonl. A gate
    before generation spares what it does not expand: `expanded` has the queries that gates do.
    """
    phases = {row["phase"]: row["seconds"] for row in timings.get("phases", [])}
    searches = {row["system"]: row["seconds"] / row["queries"]
                for row in timings.get("searches", []) if row["queries"]}  # fmt: skip

    def written_for(system: System) -> Iterator[tuple[System, Container[str] | None]]:
        """Leaves that a system rests on, with the queries that each is asked for; None: all."""
        if not system.parts:
            yield system, None
        for part in system.parts:
            for leaf, asked in written_for(part):
                spared = system.stage == BEFORE and asked is None
                yield leaf, expanded[BEFORE] if spared else asked

    def tokens_of(leaf: System, asked: Container[str] | None) -> collections.Counter[str]:
        """The tokens that it uses of each query asked; KeyError where nobody knows."""
        most = results["chosen"].get(leaf.name, {}).get("samples")
        counts = collections.defaultdict(list)
        for row in generated[leaf.name]:
            if row["split"] == "test" and (asked is None or row["query_id"] in asked):
                counts[row["query_id"]].append(row["tokens"])
        return collections.Counter({query: sum(of[:most]) for query, of in counts.items()})

    costs: dict[str, dict[str, float | None]] = {}
    for name in systems:
        system = parse_system(name)
        try:
            used: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
            whole = {}
            for leaf, asked in written_for(system):
                if leaf.strategy:
                    # Texts that two leaves use are written once, for the one that uses more.
                    used[leaf.writer] |= tokens_of(leaf, asked)
                    whole[leaf.writer] = sum(row["tokens"] for row in generated[leaf.name])
            tokens = sum(of.total() for of in used.values())
            seconds = 0.0
            for writer, of in used.items():
                taken = phases[f"expansions for evaluation, {writer}"]
                seconds += taken * of.total() / whole[writer] if whole[writer] else taken
            tokens, seconds = tokens / queries, seconds / queries
            seconds += sum(searches[part] for part in {p.name for p in system.with_parts()})
            both = round(float(tokens), DIGITS), round(float(seconds), DIGITS)
        except KeyError:  # An older run.
            both = None, None
        costs[name] = dict(zip(COSTS, both, strict=True))
    return costs


def write_cell(path: pathlib.Path, cell: Cell, most: float = MOST_BYTES) -> None:
    """Writes a cell of so many bytes at most, the same ones each time.

    Raises:
        UserError: It is larger than that, or the file cannot be written.
    """
    data = _packed(cell)
    if len(data) > most:  # The page shows no passages of this one, then.
        data = _packed(dataclasses.replace(cell, writer="", expansions=[]))
    if len(data) > most:
        raise UserError(f"{path}: would be {len(data):,} bytes; expected at most {most:,}: "
                        "take fewer test queries (data.max_test) or systems")  # fmt: skip
    write_bytes(path, data)


def _packed(cell: Cell) -> bytes:
    text = json.dumps(dataclasses.asdict(cell), ensure_ascii=False, allow_nan=False, indent=0)
    return gzip.compress(text.encode(), mtime=0)


def read_cell(path: pathlib.Path) -> Cell:
    """Reads what `write_cell` wrote, or the same JSON as it is, with today's settings.

    Raises:
        UserError: It cannot be read, or is no cell, or its values are not those of its results.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Cell)}
    try:
        data = path.read_bytes()
        record = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        cell = Cell(**record)
        for name, kind in fields.items():
            if not isinstance(getattr(cell, name), getattr(kind, "__origin__", kind)):
                raise ValueError(name)
        config = translated({"format": cell.format, "config": cell.config})
        cell = dataclasses.replace(cell, config=without_places(config))
        wrong = next(contradictions(cell), None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, EOFError, zlib.error, RecursionError, ValueError, TypeError, LookupError,
            AttributeError):  # fmt: skip
        raise UserError(f"{path}: not a cell of a table; eval.table --pack writes them") from None
    if wrong:
        raise UserError(f"{path}: {wrong}; was it changed by hand?")
    return cell


# Phases of train.joint that train nothing.
_UNTRAINING = ("data", "models", "evaluation", "expansions for evaluation", "export", "report")


def measured(cells: Sequence[Cell]) -> list[Measured]:
    """What a table knows of each collection, in the order of the cells.

    Raises:
        UserError: Cells of one collection have other queries, data or systems.
    """
    by_collection: dict[str, list[Cell]] = {}
    for cell in cells:
        by_collection.setdefault(cell.collection, []).append(cell)
    return [_measured(several) for several in by_collection.values()]


def _measured(cells: Sequence[Cell]) -> Measured:
    first, *others = cells
    for cell in others:
        for name in ("queries", "source"):
            if getattr(cell, name) != getattr(first, name):
                raise UserError(f"{cell.name}: has other {name} than {first.name}; expected the "
                                "same data for each seed")  # fmt: skip
        if cell.values.keys() != first.values.keys():
            raise UserError(f"{cell.name}: has other systems than {first.name}")
    ids = first.queries
    systems = [row["system"] for row in first.results["rows"]]
    return Measured(
        name=first.collection,
        seeds=[cell.seed for cell in cells],
        queries=ids,
        values={
            system: {m: np.array([cell.values[system][m] for cell in cells]) for m in METRICS}
            for system in systems
        },
        costs=[cell.costs for cell in cells],
        trainings=[_training(cell) for cell in cells],
        texts=dict(zip(ids, first.texts, strict=True)),
        writers={
            system: [leaf.writer for leaf in parse_system(system).leaves if leaf.strategy]
            for system in systems
        },
        writer=first.writer,
        expansions=dict(zip(ids, first.expansions, strict=True)) if first.expansions else {},
    )


def _training(cell: Cell) -> dict[str, Any]:
    """What the cell's run took and was made with, by the names of `grid.TRAINING_FIELDS`."""
    phases = cell.timings.get("phases", [])
    trained = [row["seconds"] for row in phases if not row["phase"].startswith(_UNTRAINING)]
    return {
        "training_seconds": round(sum(trained), 3),
        "seconds": cell.timings.get("total_seconds"),
        "peak_memory_bytes": cell.timings.get("peak_memory_bytes"),
        "revision": cell.revision,
        "device": ", ".join(dict.fromkeys(row["device"] for row in phases if "device" in row)),
    }
