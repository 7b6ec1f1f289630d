"""The section of a run's report on on-policy training: how each step went, and some texts."""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl
from expandr_jax.objectives.registry import on_policy_phases
from expandr_jax.report import plots
from expandr_jax.report.page import SampledText, clip, parts

_TEXTS = 12  # Queries that are shown at most.
_TEXT_CHARACTERS = 500
_BEFORE_A_NAME = "reward_"
_OF_THE_WHOLE = ("reward_deviation", "reward_error")  # What no reward is called.

# Fields of metrics.jsonl by what they are called in a plot.
_SHARES = {
    "groups that teach": "teaching", "cut": "cut", "empty": "empty", "repetitive": "repetitive",
}  # fmt: skip
_MISMATCHES = {"largest": "largest_mismatch", "mean": "mismatch"}
_SECONDS = {
    "sampling": "sampling_seconds", "encoding": "encoding_seconds",
    "search and rewards": "search_seconds", "update": "update_seconds",
}  # fmt: skip
_MODELS = ("sampling", "encoding", "update")  # Parts of a step that the models compute.


@dataclasses.dataclass(frozen=True)
class _Steps:
    """All steps of a run, one round after the other.

    Attributes:
        rows: The lines of metrics.jsonl.
        x: Their numbers, counted on over the rounds.
        begins: The numbers at which further rounds begin.
    """

    rows: Sequence[Mapping[str, Any]]
    x: Sequence[int]
    begins: Sequence[int]

    def values(self, fields: Mapping[str, str]) -> dict[str, np.ndarray]:
        """The fields that are there, by their labels; where a step lacks one, NaN."""
        columns = {
            label: np.array([_number(row.get(field)) for row in self.rows])
            for label, field in fields.items()
        }
        return {label: column for label, column in columns.items() if np.isfinite(column).any()}


def on_policy_section(workdir: pathlib.Path) -> Markup | None:
    """The HTML of how on-policy training went and of a dozen texts; None where there was none.

    Raises UserError where metrics.jsonl cannot be read. A file of texts that cannot is named.
    """
    steps = _read_steps(workdir / "metrics.jsonl")
    if steps is None:
        return None
    return parts().paragraph(_costs(steps)) + parts().figures(_charts(steps)) + _texts(workdir)


def _read_steps(path: pathlib.Path) -> _Steps | None:
    if not path.exists():
        return None
    # A run that was resumed may log a step again: the last line stands.
    phases = on_policy_phases()
    rounds: dict[int, dict[int, Mapping[str, Any]]] = collections.defaultdict(dict)
    for _, row in read_jsonl(path, {"phase": str, "step": int}):
        if row["phase"] in phases:
            rounds[row.get("round", 0)][row["step"]] = row
    rows: list[Mapping[str, Any]] = []
    x: list[int] = []
    begins: list[int] = []
    for _, by_step in sorted(rounds.items()):
        begins.append(x[-1] + 1 if x else 0)
        rows += [by_step[step] for step in sorted(by_step)]
        x += [begins[-1] + step for step in sorted(by_step)]
    return _Steps(rows, x, begins[1:]) if rows else None


def _charts(steps: _Steps) -> dict[str, str]:
    """The plots by their captions, of what the steps have."""
    charts: dict[str, str] = {}

    def draw(caption: str, fields: Mapping[str, str], ylabel: str, **options: Any) -> None:
        values = steps.values(fields)
        if values:
            charts[caption] = plots.lines(
                f"{caption}, by step: {', '.join(values)}",
                {label: (steps.x, column) for label, column in values.items()},
                xlabel="step", ylabel=ylabel, marks=steps.begins, **options,
            )  # fmt: skip

    deviations = steps.values({"reward": "reward_deviation"})
    draw("Reward; the band is the deviation among a query's texts", {"reward": "reward"}, "reward",
         bands=deviations)  # fmt: skip
    names = _reward_names(steps)
    draw("Mean of each reward, before its weight", names, "reward")
    draw("Share of groups that teach; of texts that are cut, empty, repetitive", _SHARES, "share")
    draw("KL to the base", {"KL": "kl"}, "nats a token")
    draw("Entropy", {"entropy": "entropy"}, "nats a token")
    draw("Length of a text", {"length": "length"}, "tokens")
    draw("Share of tokens whose ratio is clipped", {"clipped": "clip_fraction"}, "share")
    draw("Norm of the gradient", {"norm": "grad_norm"}, "norm")
    draw("Log-probabilities when training against those when sampling", _MISMATCHES, "difference",
         logarithmic=True)  # fmt: skip
    draw("Seconds of a step by part", _SECONDS, "seconds", logarithmic=True)
    return charts


def _reward_names(steps: _Steps) -> dict[str, str]:
    """The fields of rewards by name; none where the only one is the whole reward."""
    fields = sorted({
        field for row in steps.rows for field in row
        if field.startswith(_BEFORE_A_NAME) and field not in _OF_THE_WHOLE
    })  # fmt: skip
    alone = len(fields) == 1 and all(row.get(fields[0]) == row.get("reward") for row in steps.rows)
    return {} if alone else {field.removeprefix(_BEFORE_A_NAME): field for field in fields}


def step_costs(workdir: pathlib.Path) -> str:
    """A sentence on what the on-policy steps of a run took; "" where there was none."""
    steps = _read_steps(workdir / "metrics.jsonl")
    return _costs(steps) if steps else ""


def _costs(steps: _Steps) -> str:
    """A sentence on the seconds of a step; compiling, in the first ones, does not move medians."""
    values = steps.values({"step": "step_seconds", **_SECONDS})
    medians = {label: float(np.nanmedian(column)) for label, column in values.items()}
    whole = medians.pop("step", None)
    text = f"{len(steps.rows):,} steps"
    if whole is not None:
        text += f"; at the median {whole:.3g} s a step"
    if medians:
        text += ": " if whole is not None else "; at the median "
        text += ", ".join(f"{label} {seconds:.3g} s" for label, seconds in medians.items())
    if values.keys() >= {"step", *_MODELS}:
        rest = values["step"] - sum(values[label] for label in _MODELS)
        share = float(np.nanmedian(rest / values["step"]))
        text += f"; all that is not {', '.join(_MODELS[:-1])} or {_MODELS[-1]} {share:.2%}"
    return f"{text}."


def _texts(workdir: pathlib.Path) -> Markup:
    """A text of each of a dozen queries: before the first step, midway and at the end."""
    paths = sorted(_kept(workdir))
    chosen = {index: paths[index] for index in (0, len(paths) // 2, len(paths) - 1) if paths}
    columns: dict[str, list[Mapping[str, Any]]] = {}
    unread = Markup()
    for (round_, step), path in chosen.values():
        name = f"step {step}" if paths[-1][0][0] == 0 else f"round {round_}, step {step}"
        try:
            columns[name] = _first_of_each(path)
        except UserError as error:
            unread += parts().paragraph(str(error), "absent")
    cells = [{row["query_id"]: _cell(row) for row in rows} for rows in columns.values()]
    ids = dict.fromkeys(query for own in cells for query in own)
    several = [[own.get(query) for own in cells] for query in ids][:_TEXTS]
    note = "Texts of the same queries, with the same draws, beside their rewards."
    return parts().samples(note, [*columns], several) + unread


def _kept(workdir: pathlib.Path) -> Iterator[tuple[tuple[int, int], pathlib.Path]]:
    """Round and step of each file of texts, and the file."""
    for path in workdir.glob("round-*/policy-texts-*.jsonl"):
        name = f"{path.parent.name}/{path.name}"
        if found := re.fullmatch(r"round-(\d+)/policy-texts-(\d+)\.jsonl", name):
            yield (int(found[1]), int(found[2])), path


def _first_of_each(path: pathlib.Path) -> list[Mapping[str, Any]]:
    fields = {"query_id": str, "query": str, "text": str, "reward": float}
    first: dict[str, Mapping[str, Any]] = {}
    for _, row in read_jsonl(path, fields):
        first.setdefault(row["query_id"], row)
    return [*first.values()]


def _cell(row: Mapping[str, Any]) -> SampledText:
    terms = row.get("reward_terms")
    terms = terms if isinstance(terms, dict) and len(terms) > 1 else {}
    named = ", ".join(f"{name} {_number(value):.3g}" for name, value in terms.items())
    reward = f"reward {row['reward']:.4g}" + (f" ({named})" if named else "")
    return SampledText(row["query"], clip(row["text"], _TEXT_CHARACTERS) or "(empty)", reward)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
