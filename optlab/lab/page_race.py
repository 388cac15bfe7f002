"""The page of a race: where everyone ended, at what cost, and what one seed cannot say."""

from typing import Any

from optlab.lab import figure, page, page_figures, report
from optlab.lab.config import Config
from optlab.lab.page import Cell


def write(results: dict[str, Any]) -> str:
    """Return the page."""
    config = Config.from_json(results["config"])
    work = config.work
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return page.document(
        work.does.format(text=results["text"]),
        f"{work.network}, {report.millions(results['parameters'])} parameters "
        f"({report.sizes(config)}), {config.steps} steps of {config.tokens_per_step} {work.token} "
        f"on {results['device']}. {used}.",
        _standing(results, config),
        page.section("Curves", page.picture(figure.draw(results), f"The {work.measure}.")),
        _costs(results, config),
        _configuration(config),
    )


def _standing(results: dict[str, Any], config: Config) -> str:
    best, *others = report.rows(results)
    rows = [[Cell(cell, "best") for cell in best]]
    rows += [[Cell(c, "missed" if c.startswith("diverged") else "") for c in row] for row in others]
    return page.section(
        "Who wins",
        page.points([
            f"One seed ({config.seed}): how far seeds lie apart is not known here. "
            "`optlab race --benchmark` trains with several, tunes everyone alike and says.",
            "The same initial weights, batches and schedule for all. The rates are those of the "
            "recorded sweep, or of the command line.",
        ]),
        page.table(report.HEADINGS, rows),
    )  # fmt: skip


def _costs(results: dict[str, Any], config: Config) -> str:
    names = [n for n in report.standing(results) if results["losses"][n]["final"] is not None]
    if not names:
        return ""
    memory = {
        name: (results["losses"][name]["state_bytes_per_parameter"],
               results["losses"][name]["final"])
        for name in names
    }  # fmt: skip
    shares = {name: results["timings"][name]["optimizer_share"] for name in names}
    return page.section(
        "What it costs",
        page.picture(
            page_figures.scatter({config.work.measure: memory}, "bytes of state per parameter"),
            "Memory against the held-out loss at the end; less is better in both. Whoever ends far "
            "above the others stands at the upper edge.",
        ),
        page.picture(
            page_figures.bars({"": shares}),
            "The time of the update alone over that of a step. The network is small: the part "
            "falls as batches grow.",
        ),
    )


def _configuration(config: Config) -> str:
    rates = config.learning_rates
    facts = {
        "workload": config.workload,
        "preset": config.preset,
        "schedule": f"{config.schedule}, {config.warmup_steps} steps of warm-up",
        "steps": str(config.steps),
        "batch": f"{config.batch_size} x {config.context} {config.work.token}",
        "network": report.sizes(config),
        "seed": str(config.seed),
        "SHA-256 of the data": config.text_sha256,
        "learning rates": ", ".join(f"{name} {rate:g}" for name, rate in rates.items()),
    }
    return page.section(
        "Configuration", page.table(("what", ""), list(facts.items()), kind="words")
    )
