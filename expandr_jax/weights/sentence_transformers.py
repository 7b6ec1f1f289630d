"""The settings that a sentence-transformers directory keeps beside the weights, both ways."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.models.pooling import Pooling
from expandr_jax.weights.tokenizer import read_json

_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a directory says about turning token vectors into a text's vector.

    Attributes:
        pooling: How token vectors are joined.
        normalize: Whether vectors are scaled to length one.
        max_length: In tokens, or None if not said.
        query_prompt: Put before queries.
        document_prompt: Put before documents.
    """

    pooling: Pooling
    normalize: bool
    max_length: int | None = None
    query_prompt: str = ""
    document_prompt: str = ""


def read_settings(directory: Path) -> Settings | None:
    """Reads modules.json and the files it points to.

    Args:
        directory: A model directory.

    Returns:
        The settings, or None where there is no modules.json.

    Raises:
        UserError: If a module is neither Transformer, Pooling nor Normalize, or is set to do
            something that is not implemented.
    """
    listing = directory / "modules.json"
    if not listing.is_file():
        return None
    modules = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in read_json(listing)}
    unknown = sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown or not {"Transformer", "Pooling"} <= modules.keys():
        raise UserError(
            f"{listing}: modules are {', '.join(modules)}; "
            "supported: Transformer, Pooling, Normalize"
        )
    more = read_json(directory / "config_sentence_transformers.json", {})
    bert = read_json(directory / modules["Transformer"] / "sentence_bert_config.json", {})
    if bert.get("do_lower_case"):
        raise UserError(f"{directory}: do_lower_case in sentence_bert_config.json is not supported")
    return Settings(
        pooling=_pooling(directory / modules["Pooling"] / "config.json"),
        normalize="Normalize" in modules,
        max_length=bert.get("max_seq_length"),
        query_prompt=_prompt(more, _QUERY_PROMPTS),
        document_prompt=_prompt(more, _DOCUMENT_PROMPTS),
    )


def _pooling(path: Path) -> Pooling:
    config = read_json(path)
    if not config.get("include_prompt", True):
        raise UserError(f"{path}: include_prompt=false is not supported")
    if "pooling_mode" in config:
        kinds = [config["pooling_mode"]]
    else:
        modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        kinds = [_POOLING.get(key, key) for key in modes]
        kinds = [{"last": "lasttoken"}.get(kind, kind) for kind in kinds]
    if len(kinds) != 1 or kinds[0] not in _NAMES:
        raise UserError(
            f"{path}: pooling {'+'.join(map(str, kinds))} is not supported; "
            "supported: mean, cls, lasttoken"
        )
    return _NAMES[kinds[0]]


def _prompt(config: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The prompt of that name, or the default one, as sentence-transformers picks it."""
    prompts = config.get("prompts") or {}
    for name in (*names, config.get("default_prompt_name")):
        if prompts.get(name):
            return prompts[name]
    return ""


def write_settings(directory: Path, settings: Settings, width: int) -> None:
    """Writes modules.json and its kin, in the form that versions 2 to 6 read.

    Args:
        directory: Where the Transformer's own files are.
        settings: What to write.
        width: Length of a vector.
    """
    modules = ["Transformer", "Pooling"] + ["Normalize"] * settings.normalize
    listing = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(modules)
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    pooling |= {key: kind == settings.pooling for key, kind in _POOLING.items()}
    prompts = {"query": settings.query_prompt, "document": settings.document_prompt}
    files = {
        "modules.json": listing,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {
            "max_seq_length": settings.max_length,
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    }
    if settings.normalize:
        (directory / "2_Normalize").mkdir()
    (directory / "1_Pooling").mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
