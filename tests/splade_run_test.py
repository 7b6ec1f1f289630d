"""A sparse encoder, trained by step A's losses, and the rows that search by it."""

import pytest
from rich.console import Console

from eval.beir import evaluate_beir
from expandr_jax.errors import UserError
from expandr_jax.ranking.systems import parse_system
from tests.retriever_training_test import PAIRS, TINY, config_of, data, train  # noqa: F401

SPLADE = {"temperature": 1.0, "normalize": "none", "kl_weight": 0.0, "epochs": 30.0,
          "eval_every": 20, "batch_size": 8, "save_every": 20, "plain_share": 1.0}  # fmt: skip


def splade(data, **contrastive):  # noqa: F811
    config = config_of(data, **{**SPLADE, **contrastive})
    config.retriever.pooling, config.retriever.normalize = "splade", None
    return config


def test_names_of_its_rows():
    (plain, expanded) = parse_system("exp4fuse:splade:splade+q2d").parts
    assert (plain.retriever, expanded.retriever, expanded.strategy) == ("splade", "splade", "q2d")
    assert not expanded.needs_training
    for name in ("splade+rm3", "splade+prf-average"):
        with pytest.raises(UserError, match=r"expected splade\+ one of "):
            parse_system(name)


def test_what_a_sparse_retriever_cannot_be_is_said(data, tmp_path):  # noqa: F811
    for changes, message in (
        ({"retriever.bidirectional": True}, "are not for sparse vectors"),
        ({"contrastive.lora.rank": 2}, "lora is not for sparse vectors; all weights are trained"),
    ):
        config = splade(data)
        with config.unlocked():
            config.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / message[:8])
    config = splade(data)
    with pytest.raises(UserError, match=r"evaluation\.splade\.source is ''; expected a sparse enc"):
        evaluate_beir(config, tmp_path / "out", [str(data / "dev")], ["splade"], "dev",
                      Console(quiet=True))  # fmt: skip
