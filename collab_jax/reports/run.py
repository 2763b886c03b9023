"""The report of a run: report.json for scripts, report.md and report.html for people, two figures.
No jax.
"""

import json
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from collab_jax.cloud import Ledger, Spent
from collab_jax.records import Records
from collab_jax.reports import figures, page, summary
from collab_jax.routing.routers import ROUTERS
from collab_jax.runtime import markdown
from collab_jax.runtime.markdown import percent, points


class CloudCosts(NamedTuple):
    """Answers in the store; those to prompts of the training split; and requests ever sent, those
    that failed included.
    """

    everything: Ledger
    training: Ledger
    spent: Spent


def write(
    workdir: pathlib.Path,
    config: ConfigDict,
    filter_state,
    rows: list[dict],
    before: Records,
    after: Records,
    cost: CloudCosts,
    machine: dict[str, str],
) -> str:
    """Writes the report's files into `workdir`; returns the summary for the screen."""
    prompts = int(filter_state.prompts)
    report = {
        "before": summary.summary(before),
        "after": summary.summary(after),
        "gain": summary.gains(before, after),
        "budget": config.budget,
        "steps": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "filter_dropped": 1 - int(filter_state.kept) / prompts,
        "filter": {
            name: int(getattr(filter_state, name))
            for name in ("prompts", "d1", "d2", "kept", "kept_d2")
        },
        "cloud_calls": cost.everything.calls,
        "cloud": {
            **cost.everything._asdict(),
            "training": cost.training._asdict(),
            "spent": cost.spent._asdict(),
        },
        "config": json.loads(config.to_json_best_effort()),
        "machine": machine,
    }
    figures.training(workdir / "training.png", rows, config.budget)
    figures.frontier(workdir / "frontier.png", before, after, report)
    table = markdown_table(report)
    page.save(workdir, "report", render(report, table, after))
    beside = (
        workdir / "report.tmp"
    )  # the last file, complete or not at all: a run that has it is finished
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(workdir / "report.json")
    return f"\n{table}\n\n{closing(report)}\nreport: {workdir / 'report.html'}, report.md, report.json, frontier.png, training.png"


def markdown_table(report: dict) -> str:
    """Before against after, in percent of all prompts, with 95 % intervals."""
    before, after = report["before"], report["after"]
    lines = [
        ("accuracy on the device (marker disallowed)", lambda m: percent(m["local_accuracy"])),
        ("of these responses, without an answer", lambda m: percent(m["no_answer"])),
        ("natural: share of calls", lambda m: percent(m["natural"]["call_rate"])),
        ("natural: overall accuracy", lambda m: percent(m["natural"]["overall_accuracy"])),
    ]
    for budget in summary.BUDGETS:
        for name in summary.SUMMARY_ROUTERS:
            lines.append(
                (
                    f"{100 * budget:.0f} % calls: {ROUTERS[name].title}",
                    lambda m, b=budget, r=name: percent(m["at_budget"][str(b)][r]),
                )
            )
    lines.append(("cloud alone (100 % calls)", lambda m: percent(m["cloud_accuracy"])))
    rows = [[title, get(before), get(after)] for title, get in lines]
    return markdown.table(["% of prompts (95 % interval)", "before", "after"], rows)


def closing(report: dict) -> str:
    """What changed and what it cost, in four lines."""
    training = report["cloud"]["training"]
    gain, at = report["gain"], report["after"]["at_budget"]["0.3"]
    first = report["after"]["no_answer"]["value"]
    ties = (
        f"\nWith the marker disallowed {first:.0%} of the responses have no answer. Margin and log-probability gate send these "
        "first, so up to that share of calls the two differ only in their order among these."
        if first > summary.BUDGETS[0]
        else ""
    )
    return (
        f"At 30 % calls by margin: {points(gain['margin_at_0.3'])} points over the start; {points(at['margin_over_random'])} over random; "
        f"{'all' if at['perfect_gain_share']['value'] is None else format(at['perfect_gain_share']['value'], '.0%')} of the perfect router's gain.\n"
        f"On the device alone: {points(gain['local_accuracy'])} points.\n"
        f"{report['steps']} steps in {report['seconds']:.0f} s; the filter dropped {report['filter_dropped']:.1%} of the prompts; "
        f"{report['cloud_calls']} cloud answers in the store, evaluation included ({report['cloud']['usd']:.2f} USD).\n"
        f"Training took {training['calls']} of them: {training['input_tokens'] + training['output_tokens']} tokens, "
        f"{training['usd']:.2f} USD{_dated(report)}; {report['cloud']['spent']['calls']} requests were sent in all.{ties}"
    )


def _dated(report: dict) -> str:
    """When the prices were looked up, where they are a provider's."""
    cloud = report["config"]["cloud"]
    return f" at the prices of {cloud['prices_date']}" if cloud["kind"] == "openai" else ""


def render(report: dict, table: str, after: Records) -> str:
    """report.md."""
    config = report["config"]
    algorithm = ", ".join(f"{key} `{value}`" for key, value in config["algorithm"].items())
    examples = examples_list(after)
    return (
        f"# {config['task']['name']}, {config['model']['path']}, budget {report['budget']:g}, seed {config['seed']}\n\n"
        f"{algorithm}; {report['after']['n']} held-out prompts; every rate is a share of all prompts, with its 95 % interval. "
        f"{', '.join(f'{key} {value}' for key, value in report['machine'].items())}.\n\n"
        f"{table}\n\n{closing(report)}\n\n"
        "![accuracy against call rate](frontier.png)\n\n![training](training.png)\n\n"
        f"## Examples after training (natural decoding)\n\n{examples}\n"
    )


def examples_list(after: Records) -> str:
    """A few rows of the natural pass, as a Markdown list."""
    lines = [
        f"- **{kind}**: {markdown.code(after['prompt'][i])} -> {markdown.code(after['natural_text'][i])}"
        for kind, i in summary.examples_to_show(after)
    ]
    return "\n".join(lines)
