"""Makes a run's generator smaller: whole heads and feed-forward channels are left out.

    python -m train.prune --workdir=RUN --keep=0.75

ranks the heads, each key-value head with its query heads, and the channels of the run's trained
generator by first-order Taylor importance on the pairs of the run's step B, leaves as many in every
layer as a share of all parameters allows, and recovers by step B. Several shares, and as much left
by chance beside each: --keep=1,0.9,0.75,0.5 --importance=taylor,random.
RUN/pruned/IMPORTANCE-KEEP/generator/ loads in transformers; RUN/pruned/results.json and the table
printed have what each costs, with --evaluate also nDCG@10 of the run's trained retriever with its
passages. The same command again continues where it stopped.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from rich.console import Console

from expandr_jax.config import Config, read_config, read_run_config, with_settings
from expandr_jax.data.beir import read_beir
from expandr_jax.data.collect import prepare_data
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file, write_json
from expandr_jax.loading import load_models
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.adapter import hold_out
from expandr_jax.objectives.packing import pack, row_sizes
from expandr_jax.pair import model_hashes
from expandr_jax.pruning.importance import drawn, importances, layer_gradients, pruning_loss
from expandr_jax.pruning.quality import decoding_speed, perplexity
from expandr_jax.pruning.selection import most_important, resized, taken
from expandr_jax.pruning.widths import count_params, pruned_config
from expandr_jax.report.tables import render, wide_console
from expandr_jax.runtime.bucket import is_bucket
from expandr_jax.runtime.progress import plain_console
from expandr_jax.runtime.run import Run
from expandr_jax.weights.export import export_generator
from expandr_jax.weights.fields import Fields, read_json
from expandr_jax.weights.hf import load_generator
from train.encoding import run_retriever
from train.evaluation import evaluate_systems
from train.export import export_one
from train.generator import read_rows, train_adapter
from train.launch import define_workdir, launch

IMPORTANCES = ("taylor", "random")
LOSSES = ("likelihood", "step_b")
_ROWS = 4  # Examples of a batch of gradients.
_PASSAGES = 64  # Passages whose perplexity is measured.
_SYSTEM = "zero-shot+expansion"  # The run's models, which are not trained any more.
HEADER = (
    "keep", "importance", "parameters", "share", "heads", "channels", "perplexity before",
    "perplexity", "tokens/s", "ndcg@10",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """How a generator is made smaller.

    Attributes:
        importance: One of IMPORTANCES.
        loss: One of LOSSES, that importance is of.
        examples: So many of the run's examples it is of.
        epochs: How long step B recovers what was lost, if anything was; None: as the run had it; 0:
            not at all.
        evaluate: Whether the run's test queries are expanded and searched, too.
    """

    importance: str = "taylor"
    loss: str = "likelihood"
    examples: int = 64
    epochs: float | None = None
    evaluate: bool = False


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run's trained generator and what it is pruned by.

    Attributes:
        config: The run's.
        file: What its step B learned from.
        generator, params: Its model, the adapter merged.
        source: The weights file's sha256.
        passages: Those that perplexity is of.
    """

    config: Config
    file: pathlib.Path
    generator: Generator
    params: Mapping[str, Any]
    source: str
    passages: Sequence[str]


def prune(
    workdir: str | os.PathLike, keeps: Sequence[float], options: Options, console: Console
) -> list[dict[str, Any]]:
    """Writes smaller generators of a finished run, or goes on with that.

    Args:
        workdir: The run.
        keeps: Shares of all parameters, each above 0 and up to 1.
        options: How.
        console: Where progress is shown.

    Returns:
        The rows of RUN/pruned/results.json.

    Raises:
        UserError: There is no such run, or it has no step B by files, or a share cannot be had.
    """
    workdir = pathlib.Path(workdir).absolute()
    whole = _whole(workdir)
    if options.evaluate and whole.config.data.kind == "preferences":
        raise UserError(f"{workdir}: --evaluate: a run of pairs alone has no queries to search for")
    shape = whole.generator.module.config
    configs = {keep: pruned_config(shape, whole.params, keep) for keep in keeps}
    results = workdir / "pruned" / "results.json"
    kept_rows(results, whole.source, console)  # Before any work.
    values = importances_of(whole, options) if any(keep != 1 for keep in keeps) else None
    for keep, config in configs.items():
        directory = workdir / "pruned" / f"{options.importance}-{keep:g}"
        made = dataclasses.asdict(options) | {"keep": keep, "source": whole.source}
        del made["evaluate"]
        _check_same(directory / "pruned.json", made)
        if not (directory / "pruned.json").exists():
            rows = kept_rows(results, whole.source)  # What was measured was of another one.
            if rows.pop(_key({"keep": keep, "importance": options.importance}), None):
                _write_rows(results, rows)
            generator, params = resized(whole.generator, config), whole.params
            if values is not None:
                kept = (config.num_kv_heads, config.mlp_dim)
                chosen = (most_important(x, n) for x, n in zip(values, kept, strict=True))
                params = taken(params, shape, *chosen)
            export_generator(directory / "before", generator, params)
            write_json(directory / "pruned.json", made)
        # The whole has lost nothing: it is the run's own.
        _recover(whole, directory, 0.0 if keep == 1 else options.epochs, console)
        row = {"keep": keep, "importance": options.importance, "source": whole.source}
        row |= _measured(whole, directory)
        if options.evaluate:
            row["ndcg@10"] = _searched(workdir, whole.config, directory, console)
        rows = kept_rows(results, whole.source)
        rows[_key(row)] = rows.get(_key(row), {}) | row  # Without --evaluate the nDCG stays.
        _write_rows(results, rows)
    return [*kept_rows(results, whole.source).values()]


def _whole(workdir: pathlib.Path) -> Whole:
    """A run's generator with its adapter merged, its examples' file and its held-out passages."""
    config = read_run_config(workdir / "config.json")
    if config.objective is None:
        raise UserError(
            f"{workdir}: step_b is {config.step_b!r}, which leaves no file of pairs to prune by"
        )
    pairs_alone = config.data.kind == "preferences"
    merged = workdir / "export" / "generator"
    if pairs_alone:
        merged = workdir / "pruned" / "whole"
        if not merged.exists():
            export_one(workdir, merged, "generator", "float32")
    if not merged.exists():
        raise UserError(f"{merged}: not there; let train.joint finish this run first")
    generator, params = load_generator(str(merged))
    generator = dataclasses.replace(generator, **config.generator.chat)
    file = pathlib.Path(config.data.path)
    if not pairs_alone:
        file = workdir / f"round-{config.rounds - 1}" / config.objective.file
    source = "".join(map(hash_file, generator.files.files))
    return Whole(config, file, generator, params, source, [*_passages(workdir, pairs_alone)])


def _passages(workdir: pathlib.Path, pairs_alone: bool) -> Iterator[str]:
    """Documents relevant to test queries: a run of pairs alone has none."""
    if pairs_alone:
        return
    collection = read_beir(workdir / "data")
    if "test" not in collection.qrels:
        raise UserError(f"{workdir / 'data'}: has no test judgements; train.joint's same command "
                        "makes it again")  # fmt: skip
    relevant = {
        document
        for judged in collection.qrels["test"].values()
        for document, grade in judged.items()
        if grade > 0
    }
    there = (document for document in sorted(relevant) if document in collection.corpus)
    for document in itertools.islice(there, _PASSAGES):
        yield collection.corpus[document]


def importances_of(whole: Whole, options: Options) -> tuple[jax.Array, jax.Array]:
    """Importances of each layer's key-value groups and channels, as of `importances`."""
    config, generator = whole.config, whole.generator
    shape = generator.module.config
    if options.importance == "random":
        return drawn(shape, config.seed)
    objective = config.objective
    own = config.data.kind != "preferences"
    rows, _ = read_rows(objective, config, whole.file, generator, own=own)
    _, rows = hold_out(rows, config.learned.dev_share, objective.prompt)
    examples, _ = objective.tokenize(generator, rows[: options.examples], config.learned)
    examples = examples[: options.examples]
    size = min(_ROWS, len(examples))
    if not size:
        raise UserError(f"{whole.file}: has nothing to rank heads and channels by")
    sizes = row_sizes([example.size for example in examples], 1)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        return pruning_loss(
            params, batch, module=generator.module, objective=objective, settings=config.learned,
            loss=options.loss,
        )  # fmt: skip

    batches = (
        pack(examples[start : start + size], generator.pad_id, sizes)
        for start in range(0, len(examples) // size * size, size)
    )
    gradients = layer_gradients(loss_of, whole.params, batches)
    return importances(whole.params["layers"], gradients, shape)


def _check_same(path: pathlib.Path, made: Mapping[str, Any]) -> None:
    """Refuses a directory that was made with other settings."""
    if path.exists() and (found := Fields.read(path).values) != made:
        name = next(key for key in (*made, *found) if found.get(key) != made.get(key))
        raise UserError(
            f"{path.parent}: was made with {name}={found.get(name)!r}, not {made.get(name)!r}: "
            "move it"
        )


def _recover(
    whole: Whole, directory: pathlib.Path, epochs: float | None, console: Console
) -> pathlib.Path:
    """Trains the pruned generator by step B, and merges the adapter."""
    to = directory / "generator"
    config = whole.config
    epochs = config.dpo.epochs if epochs is None else epochs
    if to.exists():
        return to
    if not epochs:
        generator, params = load_generator(str(directory / "before"))
        export_generator(to, generator, params)
        return to
    settings = {
        "generator.source": str(directory / "before"),
        "generator.sha256": None,
        "data.kind": "preferences",
        "data.path": str(whole.file),
        "data.packages": (),
        "dpo.epochs": float(epochs),
    }
    recovery = read_config(dataclasses.asdict(with_settings(config, settings)))
    own = config.data.kind != "preferences"
    train_adapter(recovery, directory / "recovery", console, own=own)
    export_one(directory / "recovery", to, "generator", "float32")
    return to


def _measured(whole: Whole, directory: pathlib.Path) -> dict[str, Any]:
    """The measured values of a row of the table."""
    before = perplexity(*load_generator(str(directory / "before")), whole.passages)
    generator, params = load_generator(str(directory / "generator"))
    shape, parameters = generator.module.config, count_params(params)
    return {
        "parameters": parameters,
        "share": parameters / count_params(whole.params),
        "heads": shape.num_heads,
        "kv_heads": shape.num_kv_heads,
        "channels": shape.mlp_dim,
        "perplexity_before": before,
        "perplexity": perplexity(generator, params, whole.passages),
        "tokens_per_second": decoding_speed(generator.module, params),
    }


def _searched(
    workdir: pathlib.Path, config: Config, directory: pathlib.Path, console: Console
) -> float:
    """nDCG@10 of test queries with a smaller generator's passages, used as is best on dev."""
    settings = {
        "retriever.source": str(workdir / "export" / "retriever"),
        "retriever.sha256": None,
        "generator.source": str(directory / "generator"),
        "generator.sha256": None,
        "data.tests": (),
        "rounds": 1,
        "distill.epochs": 0.0,
        "evaluation.systems": (_SYSTEM,),
    }
    settled = read_config(dataclasses.asdict(with_settings(config, settings)))
    run = Run(directory / "evaluation", settled, console)
    with run.phase("data"):
        data = prepare_data(settled.data, run.checksums, run.reporter)
    models = load_models(settled, lambda _: None)
    run.check_models(model_hashes(models))
    corpus = data.collection.corpus
    retriever = run_retriever(run, models, corpus, models.retriever_params, "zero-shot")
    results = evaluate_systems(run, models, data, {"zero-shot": retriever}, {"base": None})
    run.close()
    return next(row["ndcg@10"] for row in results["rows"] if row["system"] == _SYSTEM)


def kept_rows(
    path: pathlib.Path, source: str, console: Console | None = None
) -> dict[tuple[float, int], dict[str, Any]]:
    """The rows of results.json that are of this generator, which older ones do not say.

    Raises:
        UserError: The file is damaged.
    """
    rows = read_json(path, {"rows": []})
    try:
        of = {_key(row): row for row in rows["rows"] if row.get("source", source) == source}
        others = len(rows["rows"]) - len(of)
        _ = [*map(_cells, of.values())]  # They will be told.
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: is damaged; move it, and it is measured again") from None
    if others and console is not None:
        console.print(f"{path}: {others} rows of another generator are left out", soft_wrap=True)
    return of


def _write_rows(path: pathlib.Path, rows: Mapping[tuple[float, int], Mapping[str, Any]]) -> None:
    write_json(path, {"rows": [rows[key] for key in sorted(rows)]})


def _key(row: Mapping[str, Any]) -> tuple[float, int]:
    """By which rows are told apart and ordered."""
    return -row["keep"], IMPORTANCES.index(row["importance"])


def _cells(row: Mapping[str, Any]) -> list[str]:
    told = (row["perplexity_before"], row["perplexity"], row["tokens_per_second"])
    return [
        f"{row['keep']:g}", row["importance"], str(row["parameters"]), f"{row['share']:.3f}",
        f"{row['heads']} ({row['kv_heads']})", str(row["channels"]),
        *("" if value is None else f"{value:.1f}" for value in told),
        f"{row['ndcg@10']:.4f}" if "ndcg@10" in row else "",
    ]  # fmt: skip


def main(_: Any) -> None:
    values = flags.FLAGS
    if is_bucket(values.workdir):
        raise UserError(f"--workdir={values.workdir}: expected a run on this machine")
    keeps, console = shares(values.keep), plain_console(soft_wrap=True)
    first, *others = ranked_by(values.importance)
    for importance in (first, *others):
        options = Options(importance, values.loss, values.examples, values.epochs, values.evaluate)
        # The whole is one, whatever it is ranked by.
        some = [keep for keep in keeps if keep != 1 or importance == first]
        rows = prune(values.workdir, some, options, console)
    wide_console().print(render("pruned generators", HEADER, list(map(_cells, rows))))


def shares(given: Sequence[str]) -> list[float]:
    """The shares that --keep names."""
    try:
        found = [float(share) for share in given]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        text = ",".join(given)
        raise UserError(f"--keep={text}: expected shares above 0 and up to 1, as --keep=0.9,0.75")
    return list(dict.fromkeys(found))


def ranked_by(given: Sequence[str]) -> list[str]:
    """The importances that --importance names."""
    if not given or not {*given} <= {*IMPORTANCES}:
        names = " or ".join([*IMPORTANCES, ",".join(IMPORTANCES)])
        raise UserError(f"--importance={','.join(given)}: expected {names}")
    return list(dict.fromkeys(given))


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_list("keep", ["0.75"], "Shares of all parameters to keep.")
    flags.DEFINE_list("importance", ["taylor"], "By what heads and channels are ranked, or random.")
    flags.DEFINE_enum("loss", "likelihood", LOSSES, "Whose importance it is.")
    flags.DEFINE_integer("examples", 64, "So many of the run's pairs it is of.", lower_bound=1)
    flags.DEFINE_float("epochs", None, "Recovery's, by step B; none said: the run's; 0: none.",
                       lower_bound=0.0)  # fmt: skip
    flags.DEFINE_boolean("evaluate", False, "Have the run's test queries expanded and searched.")


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
