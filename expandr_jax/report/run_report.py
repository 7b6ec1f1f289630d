"""The report of a run: one self-contained HTML page, and the table for the terminal."""

import array
import collections
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Group
from rich.text import Text

from expandr_jax import metrics
from expandr_jax.data.beir import read_qrels
from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl, write_text
from expandr_jax.objectives.registry import on_policy_phases
from expandr_jax.ranking.results import QueryMetrics
from expandr_jax.ranking.samples import RANK, REWARD, mean_by_query, read_samples
from expandr_jax.report import page, plots
from expandr_jax.report.expansion_cards import expansion_cards
from expandr_jax.report.on_policy import on_policy_section
from expandr_jax.report.page import parts
from expandr_jax.report.tables import Bold, render, results_cells
from expandr_jax.weights.fields import read_json

_OURS = "expandr"
_ON_POLICY = "On-policy training"


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html`, which needs no other file and no network, from a finished run's files.

    A section whose files are absent says so; a run that trained on-policy has no candidates, but a
    section on that. Raises UserError where results.json is absent, or a file of the run cannot be
    read.
    """
    workdir = pathlib.Path(workdir)
    results = read_json(workdir / "results.json", {})
    if not results:
        raise UserError(f"{workdir / 'results.json'}: not there; the run has not been evaluated")
    on_policy = on_policy_section(workdir)
    sections = {
        "Results": results_section(results, _values(workdir, results), _OURS),
        "Significance": _significance(results),
        **({"The hardest queries": _hardest(results)} if "hardest" in results else {}),
        **({"Gates": _gates(results)} if "gates" in results else {}),
        "Training": _training(workdir),
        _ON_POLICY if on_policy else "Rewards of the candidates": (
            on_policy or _candidates(workdir)
        ),
        "Fresh samples before and after step B": _samples(workdir),
        "Expansions": expansion_cards(workdir),
        "Where the time went": time_section(workdir),
        "Settings": settings_section(workdir, results),
    }
    contents = {title: section or _absent() for title, section in sections.items()}
    title = f"ExpandR on {results['dataset']}"
    path = workdir / "report.html"
    write_text(path, page.render_page(title, _headline(results), contents))
    return path


def write_on_policy_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` of on-policy training without results.json, from what is there so far.

    Raises UserError where a file of the run cannot be read.
    """
    workdir = pathlib.Path(workdir)
    sections = {
        _ON_POLICY: on_policy_section(workdir),
        "Where the time went": time_section(workdir),
        "Settings": settings_section(workdir, {}),
    }
    contents = {title: section or _absent() for title, section in sections.items()}
    path = workdir / "report.html"
    lead = "The generator's adapter, trained on texts of its own."
    write_text(path, page.render_page("On-policy training", lead, contents))
    return path


def _absent() -> Markup:
    return parts().paragraph("This run holds no data for this section.", "absent")


def results_table(results: Mapping[str, Any]) -> Group:
    """The rows of results.json for the terminal, best values in bold, and remarks on them."""
    title = f"{results['dataset']}, {results['queries']:,} test queries"
    tables = [render(title, *results_cells(results["rows"]))]
    if "hardest" in results:
        title = f"the {results['hardest']['queries']:,} of them that BM25 ranks worst"
        tables.append(render(title, *results_cells(results["hardest"]["rows"])))
    return Group(*tables, *map(Text, results.get("remarks", ())))


def _headline(results: Mapping[str, Any]) -> str:
    rows = {row["system"]: row for row in results["rows"]}
    text = f"{results['queries']:,} test queries."
    if _OURS in rows:
        ours = rows[_OURS]["ndcg@10"]
        text += f" expandr reaches nDCG@10 {ours:.4f}"
        gains = [
            # Without a minus before zero.
            f"{round(100 * (ours / rows[name]['ndcg@10'] - 1), 1) + 0.0:+.1f} % against {name}"
            for name in ("bm25", "zero-shot", "fine-tuned", "fine-tuned-all")
            if name in rows and rows[name]["ndcg@10"] > 0
        ]
        text += f": {', '.join(gains)}." if gains else "."
    return text


def results_section(
    results: Mapping[str, Any], values: QueryMetrics, highlight: str | None = None
) -> Markup:
    """The HTML of the rows of results.json, and of a plot of their first metric.

    `values` have that metric first; systems that they lack are shown without an interval. The bar
    of the system `highlight` stands out.
    """
    intervals = {
        system: metrics.bootstrap_interval(list(next(iter(of.values())).values()))
        for system, of in values.items()
    }
    header, rows = results_cells(results["rows"])
    metric = header[1] if rows else metrics.CHOSEN_BY
    note = metric
    if intervals:
        note += ", with 95 % bootstrap intervals of the mean over queries"
        header = [*header, f"{metric}, 95 % interval"]
        for row in rows:
            low, high = intervals.get(row[0], (None, None))
            row.append("–" if low is None else f"{low:.3f} – {high:.3f}")
    chart = plots.bars(
        f"{metric} of each system",
        {row["system"]: row[metric] for row in results["rows"]},
        intervals=intervals,
        highlight=highlight,
    )
    caption = "Mean over the queries; the best is bold."
    found = [
        f"{entry['system']} {100 * value:.1f} %"
        for entry in results.get("index_recall", [])
        for name, value in entry.items()
        if name.startswith("recall@")
    ]
    if found:
        caption += f" Of what exact search finds, the index finds: {', '.join(found)}."
    caption += "".join(f" {remark}." for remark in results.get("remarks", ()))
    return parts().table(caption, header, rows) + parts().figures({note: chart})


def _values(workdir: pathlib.Path, results: Mapping[str, Any]) -> QueryMetrics:
    if not (workdir / "qrels.trec").exists():
        return {}
    qrels = read_qrels(workdir / "qrels.trec")
    paths = {row["system"]: workdir / "runs" / f"{row['system']}.trec" for row in results["rows"]}
    return {
        system: metrics.evaluate(metrics.read_trec(path), qrels, ["ndcg@10"])
        for system, path in paths.items()
        if path.exists()
    }


def _significance(results: Mapping[str, Any]) -> Markup:
    rows = [
        [
            f"{entry['system']} against {entry['baseline']}",
            entry["metric"],
            f"{entry['difference']:+.4f}",
            (Bold if entry["p_value"] < 0.05 else str)(_p_value(entry["p_value"])),
            entry["test"],
        ]
        for entry in results.get("significance", [])
    ]
    header = ["systems", "metric", "difference", "p", "test"]
    caption = "Paired over the test queries, two-sided, each on its own; p below 0.05 is bold."
    return parts().table(caption, header, rows)


def _hardest(results: Mapping[str, Any]) -> Markup:
    hardest = results["hardest"]
    caption = f"Mean over the {hardest['queries']:,} test queries that BM25 ranks worst."
    table = parts().table(caption, *results_cells(hardest["rows"]))
    return table + _significance(hardest)


def _gates(results: Mapping[str, Any]) -> Markup:
    rows = [
        [
            entry["system"],
            f"{100 * entry['share']:.1f} %",
            *(f"{entry[name]:.4f}" for name in ("gated", "always", "never", "random")),
            *(
                (Bold if p < 0.05 else str)(_p_value(p))
                for p in (entry["p_value_always"], entry["p_value_never"])
            ),
        ]
        for entry in results["gates"]
    ]
    header = [
        "system", "queries expanded", "gated", "always", "never", "as many at random",
        "p, gated against always", "p, gated against never",
    ]  # fmt: skip
    caption = (
        f"Mean {results['gates'][0]['metric']} where the gate chooses which queries are expanded, "
        "and where all are, none is, or as many are that are drawn at random (what is to be "
        "expected). Paired tests over the test queries; p below 0.05 is bold."
    )
    return parts().table(caption, header, rows)


# How the names of trainings' phases begin, and what their losses are; "" begins all others.
_LOSSES = {
    "": "Contrastive loss of the retriever",
    "llara": "Loss of the retriever's tokens of other passages (LLaRA)",
    "distill": "Loss of the query towers",
    "reranker": "Loss of the re-ranker",
    "warm-start": "Loss of the generator's warm start",
    "generator": "Loss of the generator in step B",
}


def _kind(phase: str) -> str:
    """The longest beginning of a phase's name that `_LOSSES` has."""
    return max((kind for kind in _LOSSES if phase.startswith(kind)), key=len)


def _training(workdir: pathlib.Path) -> Markup | None:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return None
    # A run that was resumed may log a step again: the last line stands.
    points: dict[tuple[str, str], dict[int, float]] = collections.defaultdict(dict)
    for _, row in read_jsonl(path, {"phase": str, "step": int}):
        if row["phase"] in on_policy_phases():  # They have a section of their own.
            continue
        name = f"{row['phase']}, round {row['round']}" if "round" in row else row["phase"]
        for field in {"loss", "dev_ndcg@10", "margin", "accuracy", "cosine"} & row.keys():
            points[field, name][row["step"]] = row[field]

    def draw(field: str, ylabel: str, *kinds: str) -> str | None:
        series = {
            name: (sorted(values), [values[step] for step in sorted(values)])
            for (found, name), values in points.items()
            if found == field and _kind(name) in (kinds or _LOSSES)
        }
        title = f"{ylabel} by step: {', '.join(series)}"
        return plots.lines(title, series, xlabel="step", ylabel=ylabel) if series else None

    charts = {
        **{caption: draw("loss", "loss", kind) for kind, caption in _LOSSES.items()},
        "nDCG@10 on dev while training": draw("dev_ndcg@10", "dev nDCG@10"),
        "Cosine of a query tower's vectors and its teacher's": draw("cosine", "cosine", "distill"),
        "Preference margin over DPO steps": draw("margin", "margin", "generator"),
        "Share of pairs that the generator ranks right": draw("accuracy", "accuracy", "generator"),
    }
    return parts().figures({caption: chart for caption, chart in charts.items() if chart})


def _candidates(workdir: pathlib.Path) -> Markup:
    charts, rows = {}, []
    for directory in _rounds(workdir):
        # Floats alone are held: 8 bytes a candidate, and two of them a pair.
        rewards: dict[float, array.array] = collections.defaultdict(lambda: array.array("d"))
        if (directory / "candidates.jsonl").exists():
            for _, row in read_jsonl(directory / "candidates.jsonl", {"candidates": list}):
                for candidate in row["candidates"]:
                    rewards[candidate["temperature"]].append(candidate["reward"])
        samples = {"all candidates": np.concatenate([[], *rewards.values()])}
        if (directory / "preferences.jsonl").exists():
            fields = {"reward_chosen": float, "reward_rejected": float}
            pairs = read_jsonl(directory / "preferences.jsonl", fields)
            values = np.fromiter((row[name] for _, row in pairs for name in fields), float)
            samples |= zip(("chosen", "rejected"), values.reshape(-1, 2).T, strict=True)
        samples = {name: values for name, values in samples.items() if len(values)}
        number = directory.name.removeprefix("round-")
        if samples:
            title = f"Reward of {', '.join(samples)}, round {number}"
            charts[f"{title}; a triangle is the mean"] = plots.histogram(
                title, samples, xlabel="reward"
            )
        for temperature, values in sorted(rewards.items()):
            rows.append([number, f"{temperature:g}", f"{len(values):,}", f"{np.mean(values):.4f}"])
    header = ["round", "temperature", "candidates", "mean reward"]
    return parts().figures(charts) + parts().table("By temperature.", header, rows)


def _samples(workdir: pathlib.Path) -> Markup | None:
    path = workdir / "evaluation" / "samples.jsonl"
    if not path.exists():
        return None
    rows = read_samples(path)
    splits = {row["split"] for row in rows}
    split = "test" if "test" in splits else min(splits, default="")
    found = (_before_and_after(rows, split, field) for field in _FRESH)
    return Markup().join(filter(None, found))


# What is shown of fresh samples: a sentence's beginning, a chart's title and its axis.
_FRESH = {
    RANK: (
        "Mean 1/rank of the relevant document for fresh samples, each searched on its own",
        "1/rank of the relevant document, mean over a query's samples",
        "1/rank",
    ),
    REWARD: (
        "Mean reward in the corpus (reward.corpus_measure) of fresh samples, each with its query",
        "Reward in the corpus, mean over a query's samples",
        "reward",
    ),
}


def _before_and_after(rows: list[dict[str, Any]], split: str, field: str) -> Markup | None:
    start, title, axis = _FRESH[field]
    before, after = (
        mean_by_query(rows, system, split, field)
        for system in ("expandr-base-generator", "expandr")
    )
    shared = [query for query in before if query in after]
    if not shared:
        return None
    before, after = {q: before[q] for q in shared}, {q: after[q] for q in shared}
    test = metrics.paired_test(after, before)
    sentence = (
        f"{start}, on {len(shared):,} {split} queries: "
        f"{metrics.mean(before):.4f} with the base generator, {metrics.mean(after):.4f} with the "
        f"trained one ({test['difference']:+.4f}, p {_p_value(test['p_value'])}, {test['test']})."
    )
    values = {"before step B": list(before.values()), "after step B": list(after.values())}
    chart = plots.histogram(title, values, xlabel=axis, ylabel="share of queries")
    caption = f"{title}; a triangle is the mean"
    return parts().paragraph(sentence) + parts().figures({caption: chart})


def time_section(workdir: pathlib.Path) -> Markup | None:
    """The HTML of where a run's time went, or None where it has no timings.json."""
    timings = read_json(workdir / "timings.json", {}) or {}
    if not timings.get("phases"):
        return None
    total = timings.get("total_seconds") or sum(p["seconds"] for p in timings["phases"])
    rows = [
        [
            phase["phase"],
            _duration(phase["seconds"]),
            f"{100 * phase['seconds'] / max(total, 1e-9):.1f} %",
            _memory(phase.get("peak_memory_bytes")),
        ]
        for phase in timings["phases"]
    ]
    rows.append(["total", _duration(total), "100.0 %", _memory(timings.get("peak_memory_bytes"))])
    seconds: dict[str, float] = collections.defaultdict(float)
    for phase in timings["phases"]:
        seconds[phase["phase"]] += phase["seconds"]
    chart = plots.bars("Seconds by phase", seconds, label="{:,.1f} s")
    header = ["phase", "time", "share", "peak memory"]
    places = dict.fromkeys(
        f"{phase['device']} with jax {phase['jax']}"
        for phase in timings["phases"]
        if "device" in phase
    )
    caption = f"By phase, on {' and '.join(places)}." if places else "By phase."
    return parts().figures({"Seconds by phase": chart}) + parts().table(caption, header, rows)


def settings_section(workdir: pathlib.Path, results: Mapping[str, Any]) -> Markup:
    """The HTML of what was chosen on dev and of config.json; empty without either."""
    chosen = [[name, json.dumps(value)] for name, value in results.get("chosen", {}).items()]
    text = parts().table("Chosen on dev.", ["setting", "value"], chosen)
    config = read_json(workdir / "config.json", {})
    if config:
        text += parts().details("config.json", json.dumps(config, indent=2, ensure_ascii=False))
    return text


def _rounds(workdir: pathlib.Path) -> list[pathlib.Path]:
    found = [path for path in workdir.glob("round-*") if path.name[6:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[6:]))


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


def _memory(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**30:.2f} GiB"
