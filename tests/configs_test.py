"""Every config can be made, has only the settings of base.py, and can be overridden."""

import dataclasses
import importlib
import pathlib
import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import base, beir, bright, public, pydoc, quickstart, smoke, strategies, table
from expandr_jax.errors import UserError
from expandr_jax.losses.contrastive import CONTRASTIVE_LOSSES
from expandr_jax.search import ExactOptions, ScannOptions
from train.launch import unpin

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
PARTS = ("base", "stages")  # Every setting, of which the others change some.
NAMES = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", *PARTS))
SOURCES = [
    path for d in ("expandr_jax", "train", "eval") for path in (CONFIGS.parent / d).rglob("*.py")
]


def flatten(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", NAMES)
def test_a_config_has_the_settings_of_base(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert [key for key, _ in flatten(config)] == [key for key, _ in flatten(base.get_config())]


def test_public_archives_have_an_address_and_a_hash():
    for name in public.MD5:
        data = public.get_config(name).data
        assert data.url.endswith(f"/thakur/BEIR/datasets/{name}.zip")
        assert re.fullmatch("[0-9a-f]{32}", data.md5)
    assert len({*public.MD5.values()}) == len(public.MD5)
    with pytest.raises(UserError, match=r"configs/public\.py:x: expected one of msmarco, "):
        public.get_config("x")


def test_queries_that_are_documents_do_not_find_themselves():
    """Those of ArguAna and Quora, as BEIR's authors say of its sets (beir#72)."""

    def leaves_out(config):
        return config.evaluation.drop_identical_ids

    assert {n for n in public.MD5 if leaves_out(public.get_config(n))} == {"arguana", "quora"}
    for make in (beir.get_config, table.get_config):
        found = {n for n in public.MD5 if leaves_out(make(f"data/{n}"))}
        assert found == {"arguana", "quora"}
        assert leaves_out(make("data/ArguAna.zip"))
        assert not leaves_out(make("data/arguana/mine"))
    assert not leaves_out(bright.get_config("arguana"))


def test_every_setting_is_read():
    code = "\n".join(path.read_text() for path in SOURCES)
    for key, _ in flatten(base.get_config()):
        *sections, name = key.split(".")
        # lora, mesh, search and shares are passed on whole, losses' weights read by their names.
        whole = {"lora", "mesh", "search", "shares"} & set(sections)
        whole = whole or name.removesuffix("_weight") in CONTRASTIVE_LOSSES
        assert whole or re.search(rf"\.{name}\b", code), key


def test_the_options_of_an_index_are_the_library_s():
    section = base.get_config().search
    for name, options in (("exact", ExactOptions()), ("scann", ScannOptions())):
        assert section[name].to_dict() == dataclasses.asdict(options)


def test_every_setting_has_its_meaning_beside_it():
    lines = [line for part in PARTS for line in (CONFIGS / f"{part}.py").read_text().splitlines()]
    for line in lines:
        setting = re.match(r"    (config|\w+)\.\w+ = ", line)
        if setting and "ConfigDict()" not in line and "= (" not in line:
            assert "  # " in line, line


def test_the_docstrings_are_of_pinned_wheels():
    lines = (CONFIGS.parent / "requirements-pydoc.txt").read_text().splitlines()
    pinned = {line for line in lines if not line.startswith("#")}
    assert pinned == set(pydoc.PACKAGES)
    assert {*quickstart.PACKAGES, *smoke.get_config().data.packages} <= pinned


def test_strategies_has_data_of_its_own_or_waits_for_some():
    assert strategies.get_config().data.kind == "beir"
    own = strategies.get_config("pydoc").data
    assert own.kind == "pydoc"
    assert [package.partition("==")[0] for package in own.packages] == ["flax", "optax"]
    assert sum(own.shares.values()) == pytest.approx(1)
    with pytest.raises(UserError, match=r"configs/strategies\.py:x: expected pydoc"):
        strategies.get_config("x")


def parsed(monkeypatch, *arguments):
    values = flags.FlagValues()
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setattr("sys.argv", ["program", "--config=configs/quickstart.py", *arguments])
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    unpin(values["config"])
    return values.config


def test_a_hash_is_of_the_weights_that_a_config_names_not_of_others(monkeypatch):
    own = parsed(monkeypatch)
    assert own.retriever.sha256
    assert own.generator.sha256
    other = parsed(monkeypatch, "--config.retriever.source=path/to/mine", "--config.seed=1")
    assert other.retriever.sha256 is None
    assert other.generator.sha256 == own.generator.sha256
    pinned = parsed(
        monkeypatch, "--config.generator.source=mine", f"--config.generator.sha256={64 * 'a'}"
    )
    assert pinned.generator.sha256 == 64 * "a"
