"""Writes a run's models for other programs.

    python -m train.export --workdir=DIR --to=OUT --format=base

FORMAT is "base" (the generator's unmerged base, which export/adapter names), "generator" (merged),
"gguf" (that in one file for llama.cpp, OUT.gguf), "adapter", "retriever" (for
sentence-transformers), "encoder" (the retriever's model alone, the only form that AnchorDR has),
"retriever-adapter" (where contrastive.lora.rank is above 0), "retriever-base" (the unmerged base
that this names), "retriever-figret" (after the last turn that figret.rank above 0 adds) or
"query-encoder" (a distilled query tower, see docs/distill.md). `train.joint` writes generator,
adapter and retriever by itself, `train.generator` the adapter, which "generator" and "gguf" merge,
and `train.retriever` the retriever.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from expandr_jax.config import Config, read_run_config
from expandr_jax.errors import UserError
from expandr_jax.loading import merged_retriever, stored_retriever
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import split_adapter
from expandr_jax.models.retriever import Retriever
from expandr_jax.runtime.bucket import is_bucket
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.progress import plain_console
from expandr_jax.runtime.run import Run
from expandr_jax.weights.adapter import base_name, export_adapter, load_adapter
from expandr_jax.weights.export import (
    export_encoder,
    export_generator,
    export_query_encoder,
    export_retriever,
    export_trained,
)
from expandr_jax.weights.gguf_writer import GGUF_TYPES, export_gguf
from expandr_jax.weights.hf import load_generator, load_retriever, open_model
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING, export_sparse_encoder
from expandr_jax.weights.store import merge_stored
from train.launch import define_workdir, launch

OF_RUN = ("retriever", "adapter", "generator")  # What `export_run` writes of each run.
ADAPTER = "retriever-adapter"  # And of one whose step A trains an adapter.
TOWER = "query-encoder"  # And of one that has distilled a query tower.
TURNED = "retriever-figret"  # And of one with a last turn on queries that fail.
EXPORT_DTYPES = ("float32", "bfloat16", "source")
_BASE = "retriever-base"
_WHOLE = ("generator", "gguf")  # Formats that have the adapter merged.
EXPORT_FORMATS = ("base", *_WHOLE, "adapter", "retriever", "encoder", _BASE, ADAPTER, TOWER, TURNED)
# By data.kind, what other programs than train.joint train.
_PROGRAMS = {
    "triples": {"retriever": "train.retriever or train.joint"},
    "preferences": {"generator": "train.generator"},
}


def exports_of(config: Config) -> tuple[str, ...]:
    """What `export_run` writes of a run, from its export/."""
    adapter = (ADAPTER,) if config.contrastive.lora.rank else ()
    tower = (TOWER,) if config.distill.epochs else ()
    return (*OF_RUN, *adapter, *tower, *((TURNED,) if config.figret.rank else ()))


def export_run(
    run: Run,
    retriever: Retriever,
    params: Any,
    adapter: Any,
    tower: Any | None,
    turned: Any | None,
    progress: Callable[[int], None],
) -> None:
    """Writes what `exports_of` names, under export/; retriever and generator are merged.

    Those that are whole stay. `params` are the retriever's, `tower` the query tower's, `turned` the
    retriever's after its last turn.
    """
    source, lora = run.config.generator, run.config.lora
    dtype = jnp.dtype(run.config.export.dtype)

    @functools.cache
    def base() -> tuple[Generator, Any]:
        """In float32, whatever type the run computed in; its weights stay in their files."""
        return load_generator(source.source, sha256=source.sha256, in_files=True)

    def write_adapter(to: pathlib.Path) -> None:
        name = base_name(run.address, source.source)
        export_adapter(to, adapter, lora, base()[0].module.config, name)

    writes = {
        "retriever": lambda to: write_retriever(run.config, to, retriever, params),
        ADAPTER: lambda to: write_retriever_adapter(run.config, to, retriever, params, run.address),
        "adapter": write_adapter,
        "generator": lambda to: export_generator(
            to, base()[0], merge_stored(base()[1], adapter, lora), dtype
        ),
        TURNED: lambda to: write_retriever(run.config, to, retriever, turned),
        TOWER: lambda to: export_query_encoder(
            to, *merged_retriever(run.config, retriever, tower), dtype
        ),
    }
    for name in exports_of(run.config):
        if not run.checksums.intact(f"export/{name}"):
            writes[name](run.path("export", name))
            run.checksums.record(f"export/{name}")
        progress(1)


def write_retriever(config: Config, to: pathlib.Path, retriever: Retriever, params: Any) -> None:
    """Writes a trained retriever, its adapter merged if it has one."""
    dtype = jnp.dtype(config.export.dtype)
    write = export_sparse_encoder if retriever.pooling == SPLADE_POOLING else export_trained
    write(to, *merged_retriever(config, retriever, params), dtype)


def write_retriever_adapter(
    config: Config, to: pathlib.Path, retriever: Retriever, params: Any, address: str
) -> None:
    """Writes a trained retriever's adapter in PEFT form, of the run of this address."""
    base = base_name(address, config.retriever.source, _BASE)
    module = retriever.module
    export_adapter(to, split_adapter(params)[1], module.lora, module.config, base, generates=False)


def export_one(
    workdir: pathlib.Path,
    to: pathlib.Path,
    kind: str,
    dtype: str,
    address: str | None = None,
    gguf_type: str = "f16",
) -> None:
    """Writes one of a finished run's models.

    Args:
        workdir: The run.
        to: The directory to write; of "gguf" the file.
        kind: One of EXPORT_FORMATS.
        dtype: Type of the tensors, or "source" for each tensor's own in the model that the run
            started from; an adapter is always float32.
        address: What the user calls the run, where it is a copy of one in a bucket.
        gguf_type: One of GGUF_TYPES, of "gguf".

    Raises:
        UserError: The run is not there or not finished, or the model has no such format.
    """
    config = read_run_config(workdir / "config.json")
    of_retriever = ("retriever", "encoder", _BASE, ADAPTER, TOWER, TURNED)
    model = "retriever" if kind in of_retriever else "generator"
    pairs_alone = config.data.kind == "preferences"
    if not getattr(config, model).source or (model == "retriever" and pairs_alone):
        raise UserError(f"{workdir}: this run has no {model}, so no {kind} can be written")
    merged = kind in _WHOLE and pairs_alone
    made = workdir / made_as("adapter" if merged else kind)
    bases = "base", _BASE
    if kind not in bases and not made.exists():
        if kind == ADAPTER and not config.contrastive.lora.rank:
            raise UserError(f"{made}: not there; contrastive.lora.rank is 0, so all is trained")
        if kind == TURNED and not config.figret.rank:
            raise UserError(f"{made}: not there; figret.rank is 0, so there was no last turn")
        if kind == TOWER:
            raise UserError(f"{made}: not there; let train.distill make it")
        program = _PROGRAMS.get(config.data.kind, {}).get(model, "train.joint")
        raise UserError(f"{made}: not there; let {program} finish this run first")
    kept = dtype if dtype == "source" else np.dtype(jnp.dtype(dtype))
    write: Callable[..., None] = export_generator
    if model == "retriever":
        write = export_encoder if kind == "encoder" else export_retriever
        if kind in (_BASE, ADAPTER):
            exported, params = stored_retriever(config)
        else:
            exported, params = load_retriever(str(made), in_files=True)
    elif kind in _WHOLE and not merged:
        exported, params = load_generator(str(made), in_files=True)
    else:
        source = config.generator
        exported, params = load_generator(source.source, sha256=source.sha256, in_files=True)
    if kind in ("adapter", ADAPTER) or merged:
        shape = exported.module.config
        lora, adapter = load_adapter(str(made), shape)
        if not merged:
            names = (_BASE,) if kind == ADAPTER else ()
            base = base_name(address or workdir, getattr(config, model).source, *names)
            export_adapter(to, adapter, lora, shape, base, generates=kind == "adapter")
            return
        params = merge_stored(params, adapter, lora)
    elif kind not in bases and kept == "source":
        exported = _with_types_of(exported, getattr(config, model).source)
    if kind == "gguf":
        export_gguf(to, exported, params, gguf_type)
    else:
        write(to, exported, params, kept)


def made_as(kind: str) -> str:
    """What a run writes of itself that a format is made of, from the workdir."""
    return "export/" + {"encoder": "retriever", "gguf": "generator"}.get(kind, kind)


def _with_types_of(model: Any, source: str) -> Any:
    """A Retriever or Generator that takes its types for "source" from another source."""
    files = dataclasses.replace(model.files, tensors=open_model(source).tensors)
    return dataclasses.replace(model, files=files)


def target(
    to: str | None, kind: str, dtype: str | None = None, gguf_type: str | None = None
) -> pathlib.Path:
    """Where --to says that a format is written; the types are those that were asked for."""
    if not to:
        raise UserError("--to is missing: the directory to write")
    if is_bucket(to):
        raise UserError(f"--to={to}: expected a directory of this machine")
    path = pathlib.Path(to).absolute()
    if kind == "gguf" and (path.suffix != ".gguf" or path.is_dir()):
        raise UserError(f"--to={to}: expected the name of a file that ends in .gguf")
    if kind == "gguf" and dtype:
        raise UserError(f"--dtype={dtype}: is not of GGUF; expected --gguf_type")
    if kind != "gguf" and gguf_type:
        raise UserError(f"--gguf_type={gguf_type}: is of --format=gguf alone; expected --dtype")
    return path


def main(_: Any) -> None:
    values = flags.FLAGS
    asked = (getattr(values, n) if values[n].present else None for n in ("dtype", "gguf_type"))
    to = target(values.to, values.format, *asked)
    # train.generator writes an adapter, which is merged when the whole model is asked for.
    parts = {made_as(kind) for kind in (values.format, "adapter")}
    workdir = local_copy(values.workdir, "config.json", *sorted(parts))
    address = values.workdir if is_bucket(values.workdir) else None
    export_one(workdir, to, values.format, values.dtype, address, values.gguf_type)
    plain_console().print(f"{values.format} written to {to}", soft_wrap=True)


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_string(
        "to", None, "The directory (gguf: the file) to write; a model that is there is replaced."
    )
    flags.DEFINE_enum("format", "generator", EXPORT_FORMATS, "Which model.")
    flags.DEFINE_enum("dtype", "float32", EXPORT_DTYPES, "Type of the tensors.")
    flags.DEFINE_enum("gguf_type", "f16", tuple(GGUF_TYPES), "Type of a GGUF file's tables.")


if __name__ == "__main__":
    launch(main, define_flags)
