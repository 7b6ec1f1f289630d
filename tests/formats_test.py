"""What older versions wrote is read as the present one has it."""

import dataclasses
import json
import pathlib
import re
import tarfile

import pytest

from configs import base, smoke
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.expansion import strategies
from expandr_jax.files.records import hash_json
from expandr_jax.objectives.registry import STEP_B
from expandr_jax.runtime import formats
from tests.configs_test import flatten
from tests.recorded_test import STOPPED
from train.policy import policy_settings


@pytest.fixture(scope="module")
def recorded():
    """config.json of a run that was made before there were formats."""
    with tarfile.open(STOPPED) as archive:
        return json.load(archive.extractfile("smoke-stopped/config.json"))


def test_every_setting_is_recorded_or_has_what_its_absence_meant(recorded):
    assert "format" not in recorded
    config = formats.translated(recorded)
    assert {name for name, _ in flatten(config)} == {n for n, _ in flatten(base.get_config())}
    now = read_config(smoke.get_config())
    before = read_config(config)
    assert before.contrastive == now.contrastive
    assert before.dpo == now.dpo


def leaves(name, value):
    """(name, value) of a setting, or of all those in a section."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, inside in value.items() for leaf in leaves(f"{name}.{key}", inside)]


def test_a_default_that_has_changed_is_kept_for_runs_from_before():
    """But for `generator.thinking`, which a run keeps with its chats."""
    now = json.loads(json.dumps(dataclasses.asdict(read_config(base.get_config()))))
    changed = set()
    for setting, value in formats.ABSENT.items():
        for name, old in leaves(setting, value):
            section, field = formats.find_setting(now, name)
            changed |= {name} if section[field] != old else set()
    assert changed == {*formats.KEPT, "generator.thinking"}


def test_checkpoints_are_told_apart_by_what_was_recorded(recorded):
    """The hashes are of the settings as they stand in the old config.json."""
    config = read_config(formats.translated(recorded))
    for section in ("contrastive", "dpo"):
        now = hash_json(formats.identity_of(section, getattr(config, section)))
        assert now == hash_json(recorded["config"][section])


def test_a_setting_that_is_new_or_renamed(recorded, monkeypatch):
    before = json.loads(json.dumps(recorded))
    before["config"]["dpo"]["strength"] = before["config"]["dpo"].pop("beta")
    del before["config"]["dpo"]["chunk"]
    identity = hash_json(before["config"]["dpo"])
    monkeypatch.setattr(formats, "RENAMED", {"dpo.strength": "dpo.beta"})
    monkeypatch.setattr(formats, "ABSENT", {**formats.ABSENT, "dpo.chunk": 256})
    config = read_config(formats.translated(before))
    assert (config.dpo.beta, config.dpo.chunk) == (0.1, 256)
    assert hash_json(formats.identity_of("dpo", config.dpo)) == identity
    before["config"]["dpo"]["chunk"] = 64
    other = read_config(formats.translated(before))
    assert hash_json(formats.identity_of("dpo", other.dpo)) != identity


def identified():
    """The sections whose settings checkpoints are told apart by."""
    train = pathlib.Path(__file__).parent.parent / "train"
    texts = (path.read_text() for path in sorted(train.glob("*.py")))
    named = {name for text in texts for name in re.findall(r'identity_of\("(\w+)"', text)}
    return sorted(named | {kind.section for kind in STEP_B.values()})


def grown(settings, value):
    """A section with a field more."""
    fields = {"bases": (type(settings),), "frozen": True, "kw_only": True}
    kind = dataclasses.make_dataclass("Grown", [("another", int)], **fields)
    return kind(**vars(settings), another=value)


@pytest.mark.parametrize("section", identified())
def test_a_setting_that_comes_to_be_changes_no_identity(section, monkeypatch):
    settings = getattr(read_config(base.get_config()), section)
    before = formats.identity_of(section, settings)
    new = {f"{section}.another": 3, "contrastive.lora.another": 3}
    monkeypatch.setattr(formats, "ABSENT", {**formats.ABSENT, **new})
    assert formats.identity_of(section, settings) == before
    assert formats.identity_of(section, grown(settings, 3)) == before
    assert formats.identity_of(section, grown(settings, 4)) == {**before, "another": 4}
    if section == "contrastive":
        for lora in (settings.lora, dataclasses.replace(settings.lora, rank=2)):
            one, two, three = (
                formats.identity_of(section, dataclasses.replace(settings, lora=adapter))
                for adapter in (lora, grown(lora, 3), grown(lora, 4))
            )
            assert one == two != three


def test_on_policy_checkpoints_are_told_apart_as_they_always_were(monkeypatch):
    config = read_config(base.get_config())
    given = {"gain": 0.5, "search": "bm25", "functions": ("my.module:f",)}
    for reward in (config.reward, dataclasses.replace(config.reward, **given)):
        config = dataclasses.replace(config, reward=reward)
        rewards = dataclasses.asdict(reward)
        of_old = hash_json([formats.identity_of("grpo", config.grpo), rewards])
        assert policy_settings(config, "grpo") == of_old
        with monkeypatch.context() as later:
            later.setattr(formats, "ABSENT", {**formats.ABSENT, "reward.another": 3})
            same, other = (
                policy_settings(dataclasses.replace(config, reward=grown(reward, value)), "grpo")
                for value in (3, 4)
            )
        assert same == of_old != other


def test_a_run_from_before_searches_had_options(recorded):
    before = json.loads(json.dumps(recorded))
    del before["config"]["search"]["exact"], before["config"]["search"]["scann"]
    del before["config"]["answer"]["top_k"]
    assert formats.translated(before) == formats.translated(recorded)
    found = read_config(formats.translated(before))
    assert found.search == read_config(base.get_config()).search


@pytest.mark.parametrize("strategy", ["q2a", "csqe"])
def test_a_template_in_an_older_run_was_all_that_was_asked(recorded, strategy):
    before = json.loads(json.dumps(recorded))
    before["config"]["expansion"] |= {"strategy": strategy, "template": "Explain {query}."}
    found = read_config(formats.translated(before)).expansion
    (ask,) = strategies.strategy(found.strategy, found.template).steps
    assert ask.prompt.message("a norm") == "Explain a norm."
    # Since there are formats, a strategy keeps its other steps.
    now = formats.translated({**before, "format": formats.FORMAT})["expansion"]
    assert now["strategy"] == strategy


@pytest.mark.parametrize(
    ("gain", "corpus", "search"), [(1.0, 0.0, "bm25"), (0.0, 1.0, "dense"), (1.0, 1.0, "dense")]
)
def test_what_the_gain_alone_was_searched_by(recorded, gain, corpus, search):
    """`reward.search` is of both rewards; a run whose rewards were searched otherwise must end."""
    before = json.loads(json.dumps(recorded))
    before["config"]["reward"] |= {"gain": gain, "gain_search": "bm25", "corpus": corpus}
    found = read_config(formats.translated(before))
    assert found.reward.search == search  # Which is right for what evaluation makes of it.
    if gain and corpus:
        with pytest.raises(UserError, match=r"^DIR: searched by bm25 for reward\.gain and by vec"):
            formats.check_goes_on("DIR", before)
    else:
        formats.check_goes_on("DIR", before)


def test_a_renamed_setting_of_a_config_file_is_told_its_new_name():
    config = base.get_config()
    config.reward.gain_search = "bm25"
    with pytest.raises(UserError, match=r"^reward\.gain_search: is reward\.search now$"):
        read_config(config)


def test_what_newer_versions_wrote_is_refused(recorded):
    with pytest.raises(UserError, match=r"format 2, and this version reads up to 1"):
        formats.translated({**recorded, "format": 2})


def test_a_renamed_setting_is_told_its_new_name(monkeypatch, capsys):
    from train import launch

    monkeypatch.setattr(launch, "RENAMED", {"dpo.strength": "dpo.beta"})
    told = launch._unknown_setting("'strength'", ["--config.dpo.strength=2"])
    assert told == "--config.dpo.strength: is --config.dpo.beta now"
