"""Trains the generator's adapter on-policy: it samples, its texts are rewarded, it learns, again.

    python -m train.policy --config=configs/grpo.py --workdir=DIR

trains it alone, against the config's retriever as it is; `train.joint` with --config.step_b=grpo
calls the same function in each round. The same command again continues where it stopped.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console

from expandr_jax.config import Config, read_config, with_settings
from expandr_jax.data.collect import prepare_data
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, journaled
from expandr_jax.files.records import hash_json
from expandr_jax.loading import load_models
from expandr_jax.models.lora import init_lora
from expandr_jax.objectives.coaugmentation import documents_beside, score_together
from expandr_jax.objectives.policy_checks import check_policy
from expandr_jax.objectives.policy_loop import Collapsed, PolicyLoop, write_probe
from expandr_jax.objectives.registry import STEP_B
from expandr_jax.objectives.rollouts import Rollouts
from expandr_jax.objectives.scores import make_score
from expandr_jax.pair import Models, check_meshes, model_hashes
from expandr_jax.report.on_policy import step_costs
from expandr_jax.report.run_report import write_on_policy_report
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.registry import check_answers, needs, needs_vectors
from expandr_jax.rewards.sampled import self_answers
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import whole
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.vectors.corpus import CorpusRetriever
from train.demonstrations import with_demonstrations
from train.encoding import run_retriever, run_words
from train.expansions import run_expander
from train.generator import write_adapter
from train.launch import launch_training
from train.preferences import CANDIDATES_FILE, run_functions
from train.scores import RewardTools, reward_context
from train.warm_start import WARM_START_NAME, warm_start

WATCH = "policy-watch.jsonl"  # Under work/round-R: what the watch has seen of each step.


def train_policy(
    run: Run,
    models: Models,
    expander: Expander,
    retriever: CorpusRetriever,
    data: TrainingData,
    adapter: Any | None,
    tools: RewardTools,
    *,
    round_: int,
) -> Any:
    """One round of step B on-policy.

    Args:
        run: The workdir; checkpoints go to checkpoints/policy-R, some texts before, midway, after
            and where training ends to round-R/policy-texts-STEP.jsonl.
        models: Both models.
        expander: What is asked for a query; texts of earlier questions are the start's.
        retriever: Encodes and searches for the rewards.
        data: Has the queries of step B.
        adapter: The adapter to start from; None starts a new one.
        tools: What rewards are made with.
        round_: Counts from 0.

    Returns:
        The trained adapter, as each process can read it all.

    Raises:
        UserError: A setting does not fit the data or the mesh, a reward cannot be had, a loss is
            not finite, or training has collapsed.
    """
    kind, settings, seed = run.config.step_b_kind, run.config.learned, run.config.seed
    check_policy(settings, kind.section, data, models.dpo_mesh)
    params, lora = models.generator_params, models.generator.module.lora
    if adapter is None:
        adapter = init_lora(jax.random.key(seed), params, lora)
    messages, group = _asked(run, expander, data, adapter, round_)
    beside = None
    if settings.documents:
        most = run.config.answer.max_characters
        beside = documents_beside(data, settings, expander.sampler, most)
    trainer = kind.trainer(models, settings)

    @functools.cache  # Where all steps are done, nothing is sampled.
    def rollouts() -> Rollouts:
        config, limits = run.config, (settings.queries, settings.max_new_tokens)
        corpus = retriever.corpus if needs_vectors(config.reward) and not beside else None
        context = reward_context(config, tools, data, corpus, [*messages], *limits)
        if beside:
            score = score_together(context, retriever, settings.document_weights, run.processes)
        else:
            score = make_score(context, retriever, config.expansion.kind, run.processes)
        first = round_ * settings.steps
        return Rollouts(expander.sampler, adapter, messages, group, score, settings, first, beside)

    directory = run.checkpoints(f"policy-{round_}")
    # A collapse is seen some steps after the last good one, which must still be there.
    keep = max(run.config.keep, 2 + settings.watch_steps // settings.save_every)
    identity = {
        "model": models.generator_hash,
        "settings": policy_settings(run.config, kind.section),
        "lora": hash_json([lora.rank, lora.alpha, list(lora.targets)]),
        "generator": models.generator.identity,
        "queries": hash_json([*messages]),
    }
    checkpoints = Checkpoints(
        directory, identity, keep=keep, keep_period=settings.steps, agree=run.processes.all
    )
    journals = (
        CommonJournal(run.path("work", f"round-{round_}", name), run.processes)
        for name in (WATCH, "policy-collapses.jsonl")
    )

    def show(step: int, adapter: Any) -> None:
        path = run.path(f"round-{round_}", f"policy-texts-{step}.jsonl")
        write_probe(rollouts(), adapter, path, run.processes)

    log = run.training_log(kind.phase, round_)
    loop = PolicyLoop(log, models, settings, kind.section, trainer, rollouts, *journals, show)
    while True:
        try:
            return whole(loop.fit(adapter, checkpoints))
        except Collapsed as collapse:
            _after(run, models, loop, collapse, adapter, checkpoints, round_)


def policy_settings(config: Config, section: str) -> str:
    """Hash of the settings that checkpoints of such a section's training are told apart by."""
    learned = identity_of(section, getattr(config, section))
    return hash_json([learned, identity_of("reward", config.reward)])


def _after(
    run: Run, models: Models, loop: PolicyLoop, collapse: Collapsed, adapter: Any,
    checkpoints: Checkpoints, round_: int,
) -> None:  # fmt: skip
    """Goes back to a good adapter, or ends the program with that and a report.

    Raises:
        UserError: It ends: what has collapsed, and what to do.
    """
    kind = run.config.step_b_kind
    section, said = kind.section, f"{kind.phase}, round {round_}, step {collapse.step}: collapsed: "
    said += collapse.why
    step, good = loop.last_good(collapse, adapter, checkpoints)
    if loop.may_go_back:
        run.reporter.say(f"{said}; back to step {step}, with half the rate")
        loop.go_back(collapse, step, checkpoints)
        return
    name = f"round-{round_}/last-good-adapter"
    write_adapter(run, models.generator, whole(good), name)
    loop.show(collapse.step, collapse.adapter)
    report = run.processes.once(lambda: run.where(write_on_policy_report(run.workdir)))
    run.reporter.say(f"report: {report}")
    raise UserError(
        f"{said}; the adapter of step {step} is in {run.where(run.path(name))}. Lower "
        f"{section}.learning_rate or raise {section}.kl_weight in a new --workdir; or set "
        f"{section}.on_collapse to 'back'"
    )


def has_begun(workdir: pathlib.Path) -> bool:
    """Whether texts of a run have been rewarded and learned from."""
    candidates = (workdir / name / CANDIDATES_FILE for name in (WARM_START_NAME, "round-0"))
    steps = (workdir / "work" / "round-0").glob(f"{WATCH}*")
    return any(path.exists() for path in candidates) or any(steps)


def _asked(
    run: Run, expander: Expander, data: TrainingData, adapter: Any, round_: int
) -> tuple[Mapping[str, str], Callable[[str], Group]]:
    """Query id -> message, and query id -> group without candidates."""
    queries = {query: data.collection.queries[query] for query in data.generator_train}
    answers: Mapping[str, str] = {}
    if needs(run.config.reward, "answers"):
        directory = run.path("work", f"round-{round_}")
        answers = self_answers(expander.sampler, adapter, data, run.config.answer, directory)
        queries = {query: text for query, text in queries.items() if query in answers}
    phase = run.config.step_b_kind.phase
    journal = run.path("work", f"round-{round_}", "policy.jsonl")
    sample = journaled(expander, adapter, journal, f"before {phase}, round {round_}")
    messages = expander.messages(queries, sample)

    def group(query: str) -> Group:
        return Group(query, queries[query], data.positive(query), answers.get(query, ""), [])

    return messages, group


def _on_policy(config: Config) -> Config:
    """The config with a kind of step B that samples in its steps: its own, or else the first.

    Raises:
        UserError: A setting does not go with that.
    """
    if config.step_b_kind.on_policy:
        return config
    first = next(name for name, kind in STEP_B.items() if kind.on_policy)
    return read_config(dataclasses.asdict(with_settings(config, {"step_b": first})))


def train_alone(
    config: Mapping[str, Any] | Config, workdir: str | os.PathLike, console: Console
) -> pathlib.Path:
    """Trains, or goes on training, an adapter on-policy against the config's retriever as it is.

    Args and errors are as of `train.joint.train_joint`, the config as from configs/grpo.py.

    Returns:
        The adapter, in PEFT form.
    """
    config = read_config(config)
    check_meshes(config.mesh)
    _on_policy(config)  # What is wrong with it so is told before there is a workdir.
    run = Run(workdir, config, console)
    # What its config.json has stays what was given, by which the same command goes on.
    run.config = _on_policy(run.config)
    if not config.step_b_kind.on_policy:
        own = run.config.step_b
        run.reporter.say(
            f"step_b is {config.step_b!r}, which learns from files; here it is {own!r}"
        )
    config, functions = run.config, run_functions(run, used=has_begun(run.workdir))
    with run.phase("data"):
        data = prepare_data(config.data, run.checksums, run.reporter)
    check_answers(config.reward, data)
    with run.phase("models"), run.reporter.progress("models loaded", 2) as advance:
        models = load_models(config, advance)
    run.check_models(model_hashes(models))
    corpus = data.collection.corpus
    retriever = run_retriever(run, models, corpus, models.retriever_params, "zero-shot")
    tools = RewardTools(run_words(run, corpus), functions)
    expander = run_expander(run, models, data, tools.words, retriever.find)
    expander = with_demonstrations(run, models, expander, retriever, data, tools)
    adapter = warm_start(run, models, expander, retriever, data, tools)
    with run.phase(f"{config.step_b_kind.phase}, round 0"):
        adapter = train_policy(run, models, expander, retriever, data, adapter, tools, round_=0)
    retriever.release()
    directory = run.path("export", "adapter")
    with run.phase("export"):
        write_adapter(run, models.generator, adapter, "export/adapter")
    with run.phase("report"):
        report = run.processes.once(lambda: run.where(write_on_policy_report(run.workdir)))
    console.print(step_costs(run.workdir), soft_wrap=True)
    console.print(f"adapter: {run.where(directory)}", soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)
    run.close()
    return directory


if __name__ == "__main__":
    launch_training(train_alone)
