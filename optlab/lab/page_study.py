"""The page of a study: who wins where, by how much, and what nobody should conclude from it."""

from typing import Any

import numpy as np

from optlab.lab import findings, page, page_figures, report, score
from optlab.lab.findings import Findings
from optlab.lab.page import Cell
from optlab.lab.workloads import WORKLOADS

REFERENCE = report.REFERENCE


def standing(study: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the main table, the best score first."""
    found = _ordered(study)
    return _headings(found, "steps"), _time_rows(found, found.steps)


def _ordered(study: dict[str, Any]) -> Findings:
    """Return the times of all that are complete but the controls, the best score first."""
    own = [name for name in findings.complete(study) if not findings.is_control(name)]
    found = findings.find(study, own)
    order = np.argsort(-found.scores(found.steps)[0], kind="stable")
    return findings.find(study, [own[i] for i in order])


def write(study: dict[str, Any]) -> str:
    """Return the page."""
    names = findings.complete(study)
    own = [name for name in names if not findings.is_control(name)]
    about = study["about"]
    used = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = (
        f"{page.count(len(own), 'optimizer')} to the {page.count(len(about['targets']), 'target')}"
    )
    on = f"{about['device']}. {used}."
    if not own:
        parts = [page.paragraph("No optimizer has finished all of its runs yet.")]
        return page.document(head, on, *parts, _everything(study))
    found = _ordered(study)
    sections = (
        _first(study, found),
        _curves(study, found),
        _profiles(found),
        _seconds(found),
        _untuned(study, found),
        _controls(study, names),
        _costs(study, found),
        _how(study, found),
        _everything(study),
    )
    return page.document(head, on, *(part for part in sections if part))


def _time_cell(times: np.ndarray, best: float, form: str = ".0f") -> str:
    """Return median, range over seeds and ratio to the best, or how many seeds missed."""
    missed, middle = int(np.sum(~np.isfinite(times))), float(np.median(times))
    if not np.isfinite(middle):
        return Cell(f"missed {missed} of {len(times)}", "missed")
    ends = [format(t, form) for t in (times.min(), times[np.isfinite(times)].max())]
    text = f"{middle:{form}} ({' to '.join(ends)}{f', {missed} missed' * bool(missed)})"
    return Cell(text, "best") if middle == best else f"{text} · {middle / best:.2f}x"


def _time_rows(found: Findings, times: np.ndarray, form: str = ".0f") -> list[list[str]]:
    best = found.medians(times).min(0)
    middle, least, most = found.scores(times)
    baseline = found.names.index(REFERENCE) if REFERENCE in found.names else 0
    faster = score.speedup(found.medians(times), baseline)
    rows = []
    for i, name in enumerate(found.names):
        cells = [_time_cell(times[:, i, w], best[w], form) for w in range(len(best))]
        quick = f"{faster[i]:.2f}x" if faster[i] > 0 else "-"
        rows.append([name, f"{middle[i]:.3f} ({least[i]:.3f} to {most[i]:.3f})", quick, *cells])
    return rows


def _headings(found: Findings, unit: str) -> list[str]:
    return [
        "optimizer",
        "score B",
        f"against {REFERENCE}",
        *(f"{w}, {unit}" for w in found.workloads),
    ]


def _first(study: dict[str, Any], found: Findings) -> str:
    sentences = []
    for w, workload in enumerate(found.workloads):
        name, alike = findings.winner(found, w)
        if name is None:
            sentences.append(f"{workload}: most seeds of every optimizer missed the target.")
        elif alike:
            rest = ", ".join(alike)
            sentences.append(
                f"{workload}: {name} is first; its seeds do not set it apart from {rest}."
            )
        else:
            sentences.append(f"{workload}: {name} is first with every seed.")
    return page.section(
        "Who wins where",
        page.points([*sentences, *_noise(found)]),
        page.table(_headings(found, "steps"), _time_rows(found, found.steps),
                   "Steps, that is gradients, to the target, each optimizer tuned with the same "
                   "budget: median of the seeds, their range, times the best."),
        page.paragraph(
            "B is AlgoPerf's score, the mean over workloads of max(0, 4 - r)/3 with r the time "
            "over the best one; in brackets the range if any one seed stood alone, "
            "which B need not lie in, as each workload's median may be another seed's. Where these "
            f"ranges overlap, B tells no one apart. The speed against {REFERENCE} is the geometric "
            "mean over workloads, for those who reached every target."
        ),
    )  # fmt: skip


def _noise(found: Findings) -> list[str]:
    """Say how far the baseline's own seeds lie apart."""
    if REFERENCE not in found.names:
        return []
    steps = found.steps[:, found.names.index(REFERENCE), :]
    spreads = [
        f"{workload} {(s.max() - s.min()) / np.median(s):.0%}"
        for workload, s in zip(found.workloads, steps.T, strict=True)
        if np.isfinite(s).all()
    ]
    if not spreads:
        return [f"{REFERENCE} missed every target with some seed, so its spread is not known."]
    return [
        f"The noise: between {REFERENCE}'s own fastest and slowest of {len(steps)} seeds lie "
        f"{', '.join(spreads)} of its steps. A smaller difference means nothing."
    ]


def _curves(study: dict[str, Any], found: Findings) -> str:
    return page.section(
        "Curves",
        page.picture(
            page_figures.curves(study, found.names),
            "Tuned optimizers: median over seeds, and a band from the least to the largest. Names "
            "stand where the curves end. Beyond eight the others are grey.",
        ),
    )


def _profiles(found: Findings) -> str:
    workloads = len(found.workloads)
    return page.section(
        "Performance profile",
        page.picture(
            page_figures.profiles(found),
            "The share of workloads that an optimizer finishes within tau times the best median. "
            f"With {page.count(workloads, 'workload')} a step is {1 / workloads:.0%}.",
        ),
    )


def _seconds(found: Findings) -> str:
    return page.section(
        "In seconds",
        page.table(_headings(found, "s"), _time_rows(found, found.seconds, ".1f"),
                   "Seconds of training to the target, without compilation and evaluation."),
        page.table(_headings(found, "s"), _time_rows(found, found.with_compile, ".1f"),
                   "The same with the compilation of one run, which a longer training would hide."),
        page.paragraph("Seconds depend on the machine and on what else it does; steps do not."),
    )  # fmt: skip


def _untuned(study: dict[str, Any], tuned: Findings) -> str:
    names = [name for name in findings.complete(study, "default") if name in tuned.names]
    if not names:
        return ""
    found = findings.find(study, names, "default")
    rows = sorted(_time_rows(found, found.steps), key=lambda row: row[1], reverse=True)
    return page.section(
        "Without tuning",
        page.table(_headings(found, "steps"), rows,
                   "Recorded rate, a warm-up of a twentieth, everything else at its default."),
        page.paragraph(
            "The recorded rates come from a sweep on a GPT like the one here, so gpt is no foreign "
            "ground for them; other workloads are."
        ),
    )  # fmt: skip


def _controls(study: dict[str, Any], names: list[str]) -> str:
    controls = [name for name in names if findings.is_control(name)]
    if not controls:
        return ""
    of = [name for name in names if any(f" of {name}'s" in control for control in controls)]
    found = findings.find(study, [*of, *controls])
    rows = [[row[0], *row[3:]] for row in _time_rows(found, found.steps)]
    heads = ["optimizer", *(f"{w}, steps" for w in found.workloads)]
    return page.section(
        "Controls",
        page.table(heads, rows, "Is it more than another optimizer with another rate?"),
        page.paragraph(
            "A control trains with the other optimizer, this part of the tuned rate, and the same "
            "warm-up and decay; it had no trials of its own."
        ),
    )


def _costs(study: dict[str, Any], found: Findings) -> str:
    runs = findings.group(study)
    memory, shares, rows = {}, {}, []
    for workload, of in runs.items():
        title = f"{workload}: {WORKLOADS[workload].measure}"
        memory[title] = {
            n: (of[n]["tuned"][0]["state_bytes_per_parameter"],
                float(np.median(findings.ends(of[n]["tuned"]))))
            for n in found.names
        }  # fmt: skip
        shares[workload] = {n: float(np.median([r["optimizer_share"] for r in of[n]["tuned"]]))
                            for n in found.names}  # fmt: skip
    for name in found.names:
        cells = []
        for of in runs.values():
            tuned = of[name]["tuned"]
            cells += [page.span([1000 * r["step_seconds"] for r in tuned], ".1f"),
                      f"{findings.compile_seconds(of[name]):.1f}"]  # fmt: skip
        rows.append([name, *cells])
    heads = [f"{w}, {what}" for w in runs for what in ("ms a step", "s to compile")]
    return page.section(
        "What it costs",
        page.picture(page_figures.scatter(memory, "bytes of state per parameter"),
                     "Memory against the median of where the tuned runs end; less is better in "
                     "both. Whoever ends far above the others stands at the upper edge."),
        page.picture(page_figures.bars(shares), "The time of the update alone over that of a step. "
                     "These networks are small: the part falls as batches grow."),
        page.table(["optimizer", *heads], rows),
    )  # fmt: skip


def _how(study: dict[str, Any], found: Findings) -> str:
    about = study["about"]
    space, goals = about["space"], about["targets"]
    rows = [
        [w, f"{goals[w]['target']:.4g}", goals[w]["measure"], goals[w]["set_by"]["optimizer"],
         str(goals[w]["steps"]), page.span(list(goals[w]["seeds"].values()), ".4g"),
         str(goals[w]["sizes"]["steps"])]
        for w in findings.group(study)
    ]  # fmt: skip
    heads = ("workload", "target", "which is", "set by", "in steps", "its seeds", "steps here")
    decay = " to ".join(f"{x:g}" for x in space["weight_decay"])
    return page.section(
        "How it was measured",
        page.table(heads, rows, "Targets were set once, by a tuned baseline in three quarters of "
                   "the steps, and are kept with the code."),
        page.points([
            f"Every optimizer has {about['trials']} trials at the same points of a Halton "
            f"sequence: rate over {space['decades']:g} decades around its recorded one, warm-up of "
            f"{space['warmup'][0]:.0%} to {space['warmup'][1]:.0%} of the steps, weight decay from "
            f"{decay} where it has one. The schedule is {about['schedule']}.",
            "The trial that comes first to the target, or lowest if none does, trains again with "
            f"{page.count(about['seeds'], 'seed')} not tuned on. A target that most miss is a "
            "miss; so is more than four times the best.",
            "An optimizer with more hyperparameters gets no more trials, and they stay at their "
            "defaults.",
            f"Too little for a test of significance, or for intervals: "
            f"{page.count(len(found.workloads), 'workload')}, "
            f"{page.count(about['seeds'], 'seed')}. Ranges are all that is claimed.",
            "Where between two evaluations a curve crosses the target is read off a straight line.",
            *about.get("notes", ()),
        ]),
        page.picture(page_figures.tuning(study, found.names),
            "Where the trials end against their rate. Warm-up and decay differ as well, so these "
            "are no clean sweeps."),
    )  # fmt: skip


def _everything(study: dict[str, Any]) -> str:
    """Return every configuration and where it came."""
    rows = []
    for key, record in study["runs"].items():
        workload, name, kind, which = key.split("/")
        choice, goal = record["choice"], findings.target(study, workload)
        steps = findings.time(record, "step", goal)
        decay = choice["weight_decay"]
        end = findings.ends([record])[0]
        rows.append([
            workload, name, f"{kind} {which}", str(record["seed"]), f"{choice['learning_rate']:g}",
            f"{choice['warmup']:.1%}", "default" if decay is None else f"{decay:g}",
            f"{end:.4f}" if np.isfinite(end) else Cell("diverged", "missed"),
            f"{steps:.0f}" if np.isfinite(steps) else Cell("missed", "missed"),
        ])  # fmt: skip
    heads = ("workload", "optimizer", "run", "seed", "rate", "warm-up", "weight decay", "end",
             "steps to target")  # fmt: skip
    return page.section("Every run", page.table(heads, rows, kind="long"))
