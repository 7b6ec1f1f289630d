"""What a step of on-policy training learns from: texts of the policy as it is, and their rewards.

Which queries a step has, and every token, depend on the seed, the step, the query and the number of
the sample alone: a restart within a step makes the same texts again.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.batches import batch_indices
from expandr_jax.expansion.expand import drawing
from expandr_jax.expansion.prompts import is_repetitive, strip_lead_in
from expandr_jax.generation.requests import Completion, Extent, Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.objectives.policy import Sampled, row_sizes_of
from expandr_jax.objectives.settings import GrpoSettings
from expandr_jax.rewards.group import Candidate, Group

PROBE_QUERIES = 12  # Queries that are looked at before, midway and after.

# Groups without rewards to the same with rewards, and seconds by what they were spent on. All
# processes of a run call it together, each with all groups.
Score = Callable[[Sequence[Group]], tuple[list[Group], Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Beside:
    """Documents whose texts are sampled with those of a step's queries, and rewarded with them.

    Attributes:
        draw: (queries, step) to documents' groups, which have no candidates yet: a number a query
            that is always the same. No query has an id of theirs.
        message: A document's group to what is asked for it.
        first: The group of the corpus's first document.
        step: What the probe draws by, which is no step's.
    """

    draw: Callable[[Sequence[str], int], Sequence[Group]]
    message: Callable[[Group], str]
    first: Group
    step: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What was sampled for a step.

    Attributes:
        groups: As many as the settings say, those that teach nothing at the end.
        statistics: What the rewards and texts were like, for the step's metrics.
        seconds: What sampling and rewards took, by name.
    """

    groups: list[Sampled]
    statistics: dict[str, float]
    seconds: dict[str, float]


class Rollouts:
    """Samples and rewards the groups of each step.

    Attributes:
        sizes: What rows of their batches are padded to.
    """

    def __init__(
        self,
        sampler: Sampler,
        adapter: Any,
        messages: Mapping[str, str],
        group: Callable[[str], Group],
        score: Score,
        settings: GrpoSettings,
        first_step: int = 0,
        beside: Beside | None = None,
    ):
        """Makes the engine.

        Args:
            sampler: It has the generator that is trained.
            adapter: Any of the shapes of those to come.
            messages: Query id -> what is asked for it; of these queries steps are drawn.
            group: Query id -> its group, which has no candidates yet.
            score: Rewards groups.
            settings: The config's section `grpo`.
            first_step: Steps before the first one here, of earlier rounds: draws go on from there.
            beside: Documents that texts are sampled for, too.

        Raises:
            UserError: The engine does not fit the devices or their memory.
        """
        self._sampler = dataclasses.replace(sampler, log_probs=True)
        self._messages, self._group, self._score = messages, group, score
        self._settings, self._first_step, self._beside = settings, first_step, beside
        self._ids = [*messages]
        self._limit = max(sampler.settings.prompt_buckets)
        extent, cut = self._extent()
        if cut:
            sampler.reporter.say(f"{cut} prompts lost their beginning (over {self._limit} tokens)")
        self.sizes = row_sizes_of(extent.longest, settings.samples, settings.max_new_tokens)
        self._engine = self._sampler.engine(adapter, extent)

    def sample(self, step: int, adapter: Any) -> Rollout:
        """The groups of a step, sampled with an adapter; all processes of a run call it together.

        Raises:
            UserError: A reward cannot be had.
        """
        settings, begin = self._settings, time.perf_counter()
        seconds: collections.Counter[str] = collections.Counter()
        self._engine.use(adapter)
        teaching: list[Sampled] = []
        idle: list[Sampled] = []
        names = self._names(step)
        for _ in range(1 + settings.resample):
            drawn = list(itertools.islice(names, settings.queries - len(teaching)))
            if not drawn:
                break
            number = self._first_step + step
            groups = self._groups(drawn, number)
            for row in self._rewarded(groups, f"step {number}", seconds):
                (teaching if row.used else idle).append(row)
        statistics = _statistics([*teaching, *idle])
        groups = [*teaching, *idle][: settings.groups]
        seconds["rollout_seconds"] = time.perf_counter() - begin
        return Rollout(groups, statistics, dict(seconds))

    def probe(self, adapter: Any) -> list[Sampled]:
        """A text, with its reward, of each of some queries, which are the same for all adapters.

        So are the draws: what differs is the adapters'. All processes of a run call it together.
        """
        self._engine.use(adapter)
        order = np.random.default_rng(self._sampler.seed).permutation(len(self._ids))
        names = [self._ids[i] for i in sorted(order[:PROBE_QUERIES])]
        groups = self._groups(names, self._beside.step if self._beside else 0)
        return self._rewarded(groups, "probe", collections.Counter(), samples=1)

    def _groups(self, queries: Sequence[str], step: int) -> list[Group]:
        """Those of queries, and of the documents beside them, if there are any."""
        documents = self._beside.draw(queries, step) if self._beside else ()
        return [*map(self._group, queries), *documents]

    def _names(self, step: int) -> Iterator[str]:
        """The queries of a step; then all others, in an order of the step's own."""
        seed, number = self._sampler.seed, self._first_step + step
        first = batch_indices(seed, number, len(self._ids), self._settings.queries)
        yield from (self._ids[i] for i in first)
        others = np.setdiff1d(np.arange(len(self._ids)), first)
        yield from (self._ids[i] for i in np.random.default_rng([seed, number]).permutation(others))

    def _rewarded(
        self,
        groups: Sequence[Group],
        purpose: str,
        seconds: collections.Counter,
        samples: int = 0,
    ) -> list[Sampled]:
        """Some groups with their texts and what these are worth.

        The purpose sets draws apart from others'; without `samples`, a group has as many as the
        settings say.
        """
        begin, count = time.perf_counter(), samples or self._settings.samples
        prompts = {group.query_id: self._prompt(self._message(group))[0] for group in groups}
        rows = dict(self._sampled(prompts, f"policy, {purpose}/", count))
        seconds["sampling_seconds"] += time.perf_counter() - begin
        rewarded, spent = self._score(
            [
                dataclasses.replace(g, candidates=[rows[g.query_id, i] for i in range(count)])
                for g in groups
            ]
        )
        seconds.update(spent)
        return [
            Sampled(g, prompts[g.query_id], used=len({c.total for c in g.candidates}) > 1)
            for g in rewarded
        ]

    def _sampled(
        self, prompts: Mapping[str, Sequence[int]], before: str, samples: int
    ) -> Iterator[tuple[tuple[str, int], Candidate]]:
        """(Query, sample) and the text, of all queries; `before` precedes a query in its draws."""
        settings, processes = self._settings, self._sampler.processes
        requests = [
            Request(
                before + name, sample, tuple(prompts[name]), settings.temperature,
                **drawing(settings),
            )
            for name in [*prompts][processes.index :: processes.count]
            for sample in range(samples)
        ]  # fmt: skip

        def row(made: Completion) -> list[Any]:
            text = strip_lead_in(self._sampler.text(made)).strip()
            name = made.id.removeprefix(before)
            return [name, made.sample, text, made.finished, [*made.tokens], [*made.log_probs]]

        own = [row(completion) for completion in self._engine.generate(requests)]
        for part in processes.gather(own) if processes.count > 1 else [own]:
            for name, sample, text, finished, tokens, log_probs in part:
                yield (
                    (name, sample),
                    Candidate(text, settings.temperature, tokens, len(tokens), finished, log_probs),
                )

    def _message(self, group: Group) -> str:
        if group.is_document:
            return self._beside.message(group)
        return self._messages[group.query_id]

    def _prompt(self, message: str) -> tuple[list[int], bool]:
        return self._sampler.generator.chat_ids(message, self._limit)

    def _extent(self) -> tuple[Extent, int]:
        """What the engine is made for, and how many prompts are cut; a process looks at its own."""
        settings, cut = self._settings, 0
        processes, beside = self._sampler.processes, self._beside

        def asked() -> Iterator[tuple[str, str]]:
            yield from (
                (name, self._messages[name])
                for name in self._ids[processes.index :: processes.count]
            )
            if beside and processes.index == 0:  # All documents' begin as one's, where queries end.
                yield beside.first.query_id, beside.message(beside.first)

        def requests() -> Iterator[Request]:
            nonlocal cut
            for name, message in asked():
                prompt, was_cut = self._prompt(message)
                cut += was_cut
                yield Request(name, 0, tuple(prompt), settings.temperature, **drawing(settings))

        extent = self._sampler.of_all(Extent.of(requests()))
        longest = self._limit if beside else extent.longest
        count = settings.groups * settings.samples
        return dataclasses.replace(extent, count=count, longest=longest), sum(processes.gather(cut))


def _statistics(rows: Sequence[Sampled]) -> dict[str, float]:
    """What the texts of a step are worth and look like."""
    candidates = [c for row in rows for c in row.group.candidates]
    rewards = np.array([[c.total for c in row.group.candidates] for row in rows])
    spread = rewards.mean(axis=1).std(ddof=1) if len(rows) > 1 else 0.0
    names = sorted({name for c in candidates for name in c.rewards})
    return {
        "reward": rewards.mean(),
        "reward_deviation": rewards.std(axis=1, ddof=1).mean(),
        "reward_error": spread / np.sqrt(len(rows)),
        **{
            f"reward_{n}": float(np.mean([c.rewards[n] for c in candidates if n in c.rewards]))
            for n in names
        },
        "teaching": np.mean([row.used for row in rows]),
        "length": np.mean([len(c.tokens) for c in candidates]),
        "cut": np.mean([c.finished == "length" for c in candidates]),
        "empty": np.mean([not c.text for c in candidates]),
        "repetitive": np.mean([is_repetitive(c.text) for c in candidates]),
    }
