"""Trains the generator's adapter on-policy: it samples, its texts are rewarded, it learns, again.

    python -m train.policy --config=configs/grpo.py --workdir=DIR

trains it alone, against the config's retriever as it is; `train.joint` with --config.step_b=grpo
calls the same function in each round. The same command again continues where it stopped.
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console

from expandr_jax.config import Config, read_config, with_settings
from expandr_jax.data.collect import prepare_data
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, journaled
from expandr_jax.files.records import hash_json, write_jsonl
from expandr_jax.loading import load_models
from expandr_jax.models.lora import init_lora
from expandr_jax.objectives.coaugmentation import documents_beside, score_together
from expandr_jax.objectives.policy import PolicyTrainer, pack_sampled
from expandr_jax.objectives.policy_checks import check_policy
from expandr_jax.objectives.registry import STEP_B
from expandr_jax.objectives.rollouts import Rollouts
from expandr_jax.objectives.scores import make_score
from expandr_jax.objectives.settings import GrpoSettings
from expandr_jax.objectives.watch import WATCHED, collapsed
from expandr_jax.pair import Models, check_meshes, model_hashes
from expandr_jax.report.on_policy import step_costs
from expandr_jax.report.run_report import write_on_policy_report
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.registry import check_answers, needs, needs_vectors
from expandr_jax.rewards.sampled import self_answers
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import whole
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.flops import FROZEN, forward_flops
from expandr_jax.training.loop import fit
from expandr_jax.training.train_state import TrainState
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
MOST_BACKS = 5  # Times that training goes back to a good adapter; then it ends all the same.


@dataclasses.dataclass
class Collapsed(Exception):
    """Raised out of the loop: the step at which training has collapsed, why, and the adapter."""

    step: int
    why: str
    adapter: Any


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
    loop = _Loop(run, models, settings, trainer, rollouts, round_)
    while True:
        try:
            return whole(loop.fit(adapter, checkpoints))
        except Collapsed as collapse:
            adapter = loop.after(collapse, adapter, checkpoints)


def policy_settings(config: Config, section: str) -> str:
    """Hash of the settings that checkpoints of such a section's training are told apart by."""
    learned = identity_of(section, getattr(config, section))
    return hash_json([learned, identity_of("reward", config.reward)])


class _Loop:
    """Steps of on-policy training, watched."""

    def __init__(
        self,
        run: Run,
        models: Models,
        settings: GrpoSettings,
        trainer: PolicyTrainer,
        rollouts: Callable[[], Rollouts],
        round_: int,
    ):
        self._run, self._models, self._settings = run, models, settings
        self._trainer, self._rollouts, self._round = trainer, rollouts, round_
        work = run.path("work", f"round-{round_}")
        self._watched = CommonJournal(work / WATCH, run.processes)
        self._collapses = CommonJournal(work / "policy-collapses.jsonl", run.processes)
        self._phase, self._section = run.config.step_b_kind.phase, run.config.step_b_kind.section
        self._log = run.training_log(self._phase, round_)

    def fit(self, adapter: Any, checkpoints: Checkpoints) -> Any:
        """The adapter after the last step, on the mesh; raises Collapsed."""
        state = fit(
            self._log,
            self._trainer.setup.create(adapter),
            self._learn,
            self._sample,
            first_step=0,
            steps=self._settings.steps,
            checkpoints=checkpoints,
            save_every=self._settings.save_every,
            on_policy=True,
        )
        if not self._watched.finished:
            self._show(self._settings.steps, state.params)
            self._watched.finish()
        return state.params

    def after(self, collapse: Collapsed, adapter: Any, checkpoints: Checkpoints) -> Any:
        """Ends the program, or goes back: the adapter to go on from if no checkpoint is there."""
        checkpoints.wait()
        run, template = self._run, self._trainer.setup.create(adapter)
        good = max(0, collapse.step + 1 - self._settings.watch_steps)
        restored = checkpoints.restore(template, at_most=good)
        back_to, state = restored or (0, template)
        step = f"{self._phase}, round {self._round}, step {collapse.step}"
        said = f"{step}: collapsed: {collapse.why}"
        again = self._settings.on_collapse == "back" and len(self._collapses.rows) < MOST_BACKS
        if again:
            run.reporter.say(f"{said}; back to step {back_to}, with half the rate")
            checkpoints.forget(back_to)
            self._collapses.append([{"step": collapse.step, "why": collapse.why, "to": back_to}])
            return adapter
        name = f"round-{self._round}/last-good-adapter"
        write_adapter(run, self._models.generator, whole(state.params), name)
        self._show(collapse.step, collapse.adapter)
        report = run.processes.once(lambda: run.where(write_on_policy_report(run.workdir)))
        run.reporter.say(f"report: {report}")
        section = self._section
        raise UserError(
            f"{said}; the adapter of step {back_to} is in {run.where(run.path(name))}. Lower "
            f"{section}.learning_rate or raise {section}.kl_weight in a new --workdir; or set "
            f"{section}.on_collapse to 'back'"
        )

    def _sample(self, step: int, state: TrainState) -> tuple[Any, Contents]:
        """What a step learns from, on the host, and what it is made of."""
        if step in (0, self._settings.steps // 2):
            self._show(step, state.params)
        rollouts = self._rollouts()
        rollout = rollouts.sample(step, whole(state.params))
        settings, groups = self._settings, rollout.groups
        size = settings.groups // settings.minibatches
        pad_id = self._models.generator.pad_id
        packed = [
            pack_sampled(groups[first : first + size], settings, pad_id, rollouts.sizes)
            for first in range(0, len(groups), size)
        ]
        sizes = [(len(g.prompt), sum(len(c.tokens) for c in g.group.candidates)) for g in groups]
        module, params = self._models.generator.module, self._models.generator_params
        contents = Contents(
            [g.group.query_id for g in groups],
            sum(map(sum, sizes)),
            settings.passes * sum(
                FROZEN * forward_flops(module, params, 1, prompt + texts, logits=texts)
                for prompt, texts in sizes
            ),
            dict(rollout.seconds),
        )  # fmt: skip
        return (step, packed, rollout.statistics, contents.seconds), contents

    def _learn(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state after a step, and all that is logged of it; raises Collapsed."""
        step, packed, statistics, seconds = batch
        begin, trainer = time.perf_counter(), self._trainer
        known = {} if self._settings.kl_weight else {"kl": trainer.kl(packed[0])}
        rate = 0.5 ** len(self._collapses.rows)
        state, metrics = trainer.learn(state, trainer.batches(state.params, packed), rate)
        jax.block_until_ready(state)
        seconds["update_seconds"] = time.perf_counter() - begin
        metrics = {**metrics, **known, **statistics}
        row = {name: float(metrics[name]) for name in WATCHED}
        if len(self._watched.rows) > step:
            self._watched.keep(step)
        self._watched.append([row])
        why = collapsed(self._watched.rows, self._settings, self._section)
        if why:
            raise Collapsed(step, why, state.params)
        return state, metrics

    def _show(self, step: int, adapter: Any) -> None:
        """Writes texts of an adapter beside their rewards; all processes call it together."""
        groups = self._rollouts().probe(whole(adapter))
        rows = (
            {
                "query_id": each.group.query_id, "query": each.group.query, "text": c.text,
                "reward": c.total, "reward_terms": dict(c.rewards),
                **({"is_document": True} if each.group.is_document else {}),
            }
            for each in groups
            for c in each.group.candidates
        )  # fmt: skip
        path = self._run.path(f"round-{self._round}", f"policy-texts-{step}.jsonl")
        self._run.processes.once(lambda: write_jsonl(path, rows))


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
