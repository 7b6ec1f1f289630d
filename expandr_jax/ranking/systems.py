"""The systems that are compared, by name: what retrieves, what is fused, what is ranked again.

    LEAF      bm25, dense, zero-shot, fine-tuned, expandr, ...: a retriever, and whose expansions;
              bm25q is BM25 that weighs the words of the query, too; splade searches by a sparse
              encoder, evaluation.splade, for texts as BM25 does
    BASE+S    the retriever BASE with the queries expanded by a strategy or, "expansion", as
              the config says; by the generator before training
    BASE@D    over a corpus whose documents are expanded; BASE@D+S likewise
    LEAF+F    feedback: the query's vector, or for BM25 the weights of its words, moved towards the
              documents that LEAF finds first
    F:A:B     a fusion of all systems that follow
    R:A       A's first documents ranked again: by rerank, or by listwise, the untrained generator

expandr-gated and expandr-gated-after are, of each query, expandr-plain or expandr, as a gate says
(expandr_jax/ranking/gate.py).

`train.joint` and `eval.beir` read the same names. A new fusion or feedback is an entry of
expandr_jax/ranking/stages.py, a re-ranker one of ranking/rerank.py, a strategy one of
expandr_jax/expansion/strategies.py.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from expandr_jax.errors import UserError
from expandr_jax.expansion.prompts import DOCUMENT_PROMPTS
from expandr_jax.expansion.strategies import PUBLISHED, STRATEGIES
from expandr_jax.ranking.gate_features import AFTER, GATES
from expandr_jax.ranking.listwise import LISTWISE, ListPrompts, ListwiseSettings, check_listwise
from expandr_jax.ranking.rerank import RERANKERS, named_hashes
from expandr_jax.ranking.settings import EvaluationSettings, SpladeSettings
from expandr_jax.ranking.stages import (
    FEEDBACKS,
    FUSIONS,
    WEIGHED_FUSIONS,
    WEIGHINGS,
    WORD_FEEDBACKS,
)
from expandr_jax.weights.sparse_encoder import load_sparse_encoder

if TYPE_CHECKING:
    from expandr_jax.models.generator import Generator

BM25 = "bm25"
SPLADE = "splade"
BY_TEXTS = (BM25, SPLADE)  # Searched for a query and its passages as one text.
UNTRAINED = "zero-shot"  # The retriever as the config names it.
BASE = "base"  # The generator as the config names it.
ALL_LABELS = "fine-tuned-all"  # Trained, plain, on the queries of step A and of step B.
OURS = "expandr"  # The row that others are compared with, and the retriever that is ranked by.
DISTILLED, DISTILLED_CONTROL = "expandr-distilled", "expandr-distilled-control"
QUERY_TOWERS = (
    DISTILLED,
    DISTILLED_CONTROL,
)  # They encode queries alone, and search `OURS`'s documents.
AGAIN = (*RERANKERS, LISTWISE)  # Stages that rank the first documents of a system again.
FIGRET, FIGRET_CONTROL = "expandr-figret", "expandr-figret-control"
TURNS = (FIGRET, FIGRET_CONTROL)  # `OURS` after a last turn.
EXPANSION = "expansion"  # The strategy, template and limits of the config's `expansion` section.


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the results: a leaf, which searches the corpus, or a stage over other systems.

    Attributes:
        name: As the user wrote it; its run is runs/NAME.trec.
        retriever: What a leaf searches with: one of `BY_TEXTS`, or whose weights encode:
            `UNTRAINED`, "fine-tuned", `ALL_LABELS`, "expandr", "round-R", or one of `QUERY_TOWERS`
            or `TURNS`.
        generator: Who expands a leaf's queries: `BASE`, "trained" or "round-R"; None for nobody.
        strategy: How it does: a key of `STRATEGIES`, or `EXPANSION`; None where nobody does.
        documents: How a leaf's corpus is expanded, a key of `DOCUMENT_PROMPTS`, or None.
        stage: A key of `FUSIONS`, `FEEDBACKS` or `WORD_FEEDBACKS`, or one of `AGAIN` or `GATES`;
            None for a leaf.
        parts: What the stage works on; of a gate the plain row, the expanded one and BM25.
        weighing: How BM25 weighs the words of a leaf's queries, a key of `WEIGHINGS`.
    """

    name: str
    retriever: str | None = None
    generator: str | None = None
    strategy: str | None = None
    documents: str | None = None
    stage: str | None = None
    parts: tuple["System", ...] = ()
    weighing: str = BM25

    def with_parts(self) -> Iterator["System"]:
        """The systems to rank for it, each after its own parts; itself last."""
        for part in self.parts:
            yield from part.with_parts()
        yield self

    @property
    def leaves(self) -> tuple["System", ...]:
        """The searches that it rests on."""
        return tuple(system for system in self.with_parts() if not system.parts)

    @property
    def retrievers(self) -> frozenset[str]:
        """The retrievers that its leaves search with."""
        return frozenset(leaf.retriever for leaf in self.leaves)

    @property
    def generators(self) -> frozenset[str]:
        """The generators that write for it: expansions of queries or documents, or orders."""
        of_queries = {leaf.generator for leaf in self.leaves if leaf.generator}
        asked = any(part.documents or part.stage == LISTWISE for part in self.with_parts())
        return frozenset(of_queries | ({BASE} if asked else set()))

    @property
    def is_chosen(self) -> bool:
        """Whether there is a choice in it: of its expansions, weights, depth or gate."""
        return self.strategy is not None or self.stage in (*WEIGHED_FUSIONS, *GATES, *AGAIN)

    @property
    def writer(self) -> str:
        """Who writes for a leaf's queries, in words: "base generator, hyde", for example."""
        named = "" if self.strategy == EXPANSION else f", {self.strategy}"
        return f"{self.generator} generator{named}"

    @property
    def needs_training(self) -> bool:
        """Whether a training run alone has what it is made of."""
        return not (self.retrievers <= {*BY_TEXTS, UNTRAINED} and self.generators <= {BASE})


RETRIEVERS = {  # What a name may begin with -> what searches.
    BM25: BM25, "dense": UNTRAINED, "zero-shot": UNTRAINED, "fine-tuned": "fine-tuned",
    ALL_LABELS: ALL_LABELS, "expandr-plain": "expandr", **dict.fromkeys(WEIGHINGS, BM25),
    SPLADE: SPLADE,
}  # fmt: skip
NAMED_SYSTEMS = {  # Rows of train.joint whose names are no more than names.
    "expandr": System("expandr", "expandr", "trained", EXPANSION),
    "expandr-base-generator": System("expandr-base-generator", "expandr", BASE, EXPANSION),
    "bm25+expansion": System("bm25+expansion", BM25, "trained", EXPANSION),
    **{name: System(name, name) for name in (*QUERY_TOWERS, *TURNS)},
}
_GATED = System("expandr-plain", OURS), NAMED_SYSTEMS[OURS], System(BM25, BM25)
NAMED_SYSTEMS |= {name: System(name, stage=name, parts=_GATED) for name in GATES}
_ROUND = re.compile(r"expandr-round(\d+)")  # Retriever and generator as they were after a round.

ALL = "all"  # Stands for these. Expanded documents, a text for each, have to be asked for.
TABLE = (
    *WEIGHINGS, *(f"bm25+{name}" for name in (*PUBLISHED, *WORD_FEEDBACKS)),
    "dense", *(f"dense+{name}" for name in (*PUBLISHED, *FEEDBACKS)),
    "rrf:bm25:dense", "interpolation:bm25:dense", "rrf:bm25:dense+q2d",
    "exp4fuse:bm25:bm25+q2d", "exp4fuse:dense:dense+q2d",
)  # fmt: skip


def parse_system(name: str) -> System:
    """Reads the name of a system, as the module's docstring has them.

    Raises:
        UserError: There is no such system.
    """
    system, rest = _parse(name.split(":"), name)
    if rest:
        raise UserError(f"system {name!r}: {':'.join(rest)} follows a system that is complete")
    return system


def parse_systems(names: Sequence[str]) -> list[System]:
    """Reads names of systems, `ALL` among them, each system once.

    Raises:
        UserError: There is no such system, or there are none.
    """
    each = [name for given in names for name in (TABLE if given == ALL else (given,))]
    if not each:
        raise UserError("no systems; expected bm25, dense and so on, or all")
    return [parse_system(name) for name in dict.fromkeys(each)]


def check_stages(systems: Sequence[System], settings: EvaluationSettings) -> None:
    """Refuses, by a UserError, systems that the config's section `evaluation` has no means for."""
    for stage in _rerankers(systems):
        RERANKERS[stage].check(getattr(settings, stage))
    if _stages(systems) & {LISTWISE}:
        check_listwise(settings.listwise)
    if any(SPLADE in system.retrievers for system in systems):
        check_sparse(settings.splade)


def check_sparse(settings: SpladeSettings) -> None:
    """Refuses, by a UserError, a source that is none, or no sparse encoder."""
    if not settings.source:
        raise UserError(
            f"evaluation.splade.source is ''; expected a sparse encoder, as a system has {SPLADE}"
        )
    load_sparse_encoder(settings.source, max_length=settings.max_length)


def stage_hashes(systems: Sequence[System], settings: EvaluationSettings) -> dict[str, str]:
    """Hashes of the models that systems have beside a run's pair, as of `model_hashes`."""
    hashes: dict[str, str] = {}
    for stage in _rerankers(systems):
        hashes |= RERANKERS[stage].hashes(getattr(settings, stage))
    if any(SPLADE in system.retrievers for system in systems):
        splade = settings.splade
        loaded = load_sparse_encoder(splade.source, max_length=splade.max_length)
        hashes |= named_hashes("evaluation.splade.source", *loaded)
    return hashes


def check_prompts(
    systems: Sequence[System],
    generator: "Generator",
    settings: ListwiseSettings,
    prompt_buckets: Sequence[int],
) -> None:
    """Refuses, by a UserError, lists of passages that the generator's prompts have no room for."""
    if _stages(systems) & {LISTWISE}:
        ListPrompts(generator, settings, prompt_buckets)


def _rerankers(systems: Sequence[System]) -> list[str]:
    stages = _stages(systems)
    return [stage for stage in RERANKERS if stage in stages]


def _stages(systems: Sequence[System]) -> set[str | None]:
    return {part.stage for system in systems for part in system.with_parts()}


def row_of_round(round_: int) -> System:
    """The retriever and the generator as they were after a round that was not the last."""
    weights = f"round-{round_}"
    return System(f"expandr-round{round_}", weights, weights, EXPANSION)


def counterparts(systems: Sequence[System]) -> list[tuple[str, str]]:
    """Pairs (system, other) where a stage rests on `OURS`, and on another system in the other.

    interpolation:bm25:expandr has interpolation:bm25:fine-tuned for a counterpart, where that is
    one of the systems, too; and each of its parts but `OURS` itself, such as bm25.
    """
    pairs = []
    for ours in systems:
        if not ours.parts or not any(part.name == OURS for part in ours.with_parts()):
            continue
        pairs += [
            (ours.name, other.name)
            for other in systems
            if other.name in {part.name for part in ours.parts if part.name != OURS}
            or (other != ours and _differ_by_ours(ours, other))
        ]
    return pairs


def _differ_by_ours(one: System, other: System) -> bool:
    """Whether the second is the first with something else in the place of `OURS`."""
    if one.name == OURS or one == other:
        return True
    alike = one.stage == other.stage and len(one.parts) == len(other.parts) > 0
    return alike and all(map(_differ_by_ours, one.parts, other.parts))


def _parse(words: Sequence[str], whole: str) -> tuple[System, Sequence[str]]:
    """The system that begins with the first of some words, and the words that are left."""
    stage, rest = words[0], words[1:]
    if stage in AGAIN:
        if not rest:
            raise UserError(f"system {whole!r}: expected a system to rank again, {stage}:dense")
        part, left = _parse(rest, whole)
        return System(f"{stage}:{part.name}", stage=stage, parts=(part,)), left
    if stage not in FUSIONS:
        return _parse_leaf(stage), rest
    parts = []
    while rest:
        part, rest = _parse(rest, whole)
        parts.append(part)
    if len({part.name for part in parts}) < 2:
        raise UserError(f"system {whole!r}: expected two systems to fuse, {stage}:bm25:dense")
    return System(":".join(words), stage=stage, parts=tuple(parts)), rest


def _parse_leaf(name: str) -> System:
    """A leaf, or feedback on one."""
    if name in NAMED_SYSTEMS:
        return NAMED_SYSTEMS[name]
    if found := _ROUND.fullmatch(name):
        return row_of_round(int(found[1]))
    inner, _, method = name.rpartition("+")
    if inner and method in (*FEEDBACKS, *WORD_FEEDBACKS):
        part = _parse_leaf(inner)
        # BM25's queries have no vectors, and vectors no words.
        if part.retrievers == {BM25} and method in WORD_FEEDBACKS:
            return System(name, stage=method, parts=(part,))
        if part.retrievers.isdisjoint(BY_TEXTS) and method in FEEDBACKS:
            return System(name, stage=method, parts=(part,))
    where, plus, method = name.partition("+")
    base, at, documents = where.partition("@")
    if base not in RETRIEVERS:
        known = ", ".join((*RETRIEVERS, *NAMED_SYSTEMS, *FUSIONS, *AGAIN))
        raise UserError(f"system {name!r} is unknown; a system begins with one of {known}")
    strategies = (*STRATEGIES, EXPANSION)
    if plus and method not in strategies:
        feedbacks = {BM25: WORD_FEEDBACKS, SPLADE: ()}.get(RETRIEVERS[base], FEEDBACKS)
        methods = *strategies, *feedbacks
        raise UserError(f"system {name!r}: expected {base}+ one of {', '.join(methods)}")
    if at and documents not in DOCUMENT_PROMPTS:
        known = ", ".join(DOCUMENT_PROMPTS)
        raise UserError(f"system {name!r}: expected {base}@ one of {known}")
    return System(name, RETRIEVERS[base], BASE if method else None, method or None,
                  documents or None, weighing=base if base in WEIGHINGS else BM25)  # fmt: skip


def read_by_a_gate(systems: Sequence[System], generator: str, strategy: str) -> bool:
    """Whether a gate after generation reads of what a generator writes by a strategy."""
    gates = (p for system in systems for p in system.with_parts() if p.stage == AFTER)
    return (generator, strategy) in {(g.parts[1].generator, g.parts[1].strategy) for g in gates}
