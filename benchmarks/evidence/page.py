"""``docs/evidence.md``: made of the tables of the studies, never typed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import sem

from benchmarks.evidence import jobs, selection, tuning
from benchmarks.evidence.jobs import Job
from benchmarks.evidence.picture import Point, draw_precision, draw_trained
from benchmarks.evidence.selection import Choice
from benchmarks.evidence.studies import STUDIES, Study
from benchmarks.evidence.tuning import Trained
from benchmarks.evidence.variants import EVERYTHING
from flows.settings import RunSettings
from p2d_core.comparison import arms, picture
from p2d_core.comparison.arms import NONE
from p2d_core.comparison.statistics import Interval, mean_interval
from p2d_core.comparison.verdict import answers, arm_lines, front
from p2d_core.synthetic.hard_worlds import WORLDS

PAGE = "evidence.md"
MACHINE = "machine.json"
HEAD = """# Does choosing by heads work?

This page is written by `python -m benchmarks.evidence` from the tables in `docs/evidence/`; no
figure on it is typed. `python -m benchmarks.evidence --study NAME` runs a study again and keeps its
tables, `--study` without a name writes the page alone. Means are over seeds, each with a world,
draws and training of its own (the base stays the same); ± is half of a 95% interval (Student's t).
"better" and "worse" are said where a paired 95% interval leaves out 0, "not shown" where it does
not. Seconds and AER include whatever else the machine did at the time. What was chosen is what is
trained on, without the proxy samples (`training.with_proxy: false`): so a choice shows what it is
worth. The studies searched, with-proxy, rates, presets and proxy-run train as it is by default.
"""
DEFAULT = RunSettings.model_validate({"base": "-", "target": {"path": "-"}})
DRAW = "random"
RANDOM_HEADS = "random heads"
ABOUT_AS_GOOD = 0.02
"""Two points of exact match."""
OVER_TFIDF = 0.2
"""Of precision: what choosing by heads has to add where words do not tell the target."""
OVER_FULL, KEPT = 0.08, 0.9
"""Of exact match on the target over full fine-tuning (the paper's 8.3 points), and on the old
skills."""


def write(kept: Path) -> Path:
    """The page beside the folder of tables, with a chart a study in it."""
    parts = [HEAD]
    for name, study in STUDIES.items():
        folder = kept / name
        if study.trained and (folder / arms.COMPARISON).exists():
            parts += _trained(name, study, folder)
        elif study.variants and (folder / tuning.TABLE).exists():
            parts += _tuned(name, study, folder)
        elif study.jobs and (folder / jobs.TABLE).exists():
            parts += _whole_jobs(name, study, folder)
        elif (folder / selection.TABLE).exists():
            parts += _chosen(name, study, folder)
    page = kept.parent / PAGE
    page.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return page


def _chosen(name: str, study: Study, folder: Path) -> Iterator[str]:
    found = selection.read(folder)
    yield from _title(name, study, folder, {choice.seed for choice in found})
    draw_precision(_precisions(found), folder / "precision.png")
    yield f"![Precision of each scorer, by world](evidence/{name}/precision.png)\n"
    yield (
        "Precision: share of clean target samples among the chosen, as many as the corpus has of "
        "them and at most a tenth of it. AUC: how well the order tells clean target samples from "
        "those with wrong answers, near ones, others; 0.5 is chance. Random heads: the mean of "
        "their draws counts once a seed.\n"
    )
    yield from _in_short(found)
    for world in dict.fromkeys(choice.world for choice in found):
        of_world = [choice for choice in found if choice.world == world]
        yield f"### {world}\n"
        about = next((each.about for kind, each in WORLDS.items() if kind == world), "")
        n = of_world[0]
        yield f"{about[:1].upper()}{about[1:]}{'. ' if about else ''}{n.selected} chosen.\n"
        yield "| scorer | heads | precision | AUC wrong | AUC near | AUC other | seconds |"
        yield "|---|---|---|---|---|---|---|"
        rows = _by_arm(of_world)
        for scorer, ranker in sorted(rows, key=lambda arm: -_mean_precision(rows[arm])):
            of_arm = rows[scorer, ranker]
            cells = [
                str(_over_seeds(of_arm, "precision") or ""),
                *(
                    str(_over_seeds(of_arm, f"auc_{label}") or "")
                    for label in ("wrong", "near", "other")
                ),
                f"{sum(c.seconds for c in of_arm) / len(of_arm):.1f}",
            ]
            yield f"| {scorer} | {ranker} | {' | '.join(cells)} |"
        yield ""
        yield from _bar(rows)
        yield from _answers(rows)


def _in_short(found: Sequence[Choice]) -> Iterator[str]:
    """The best scorer of each world, and how often heads made a difference that is shown."""
    yield "| world | best | precision | default scorer | TF-IDF | random |"
    yield "|---|---|---|---|---|---|"
    tally: dict[str, Counter[int]] = {}
    for world in dict.fromkeys(choice.world for choice in found):
        rows = _by_arm([choice for choice in found if choice.world == world])
        best = max(rows, key=lambda arm: _mean_precision(rows[arm]))
        default = rows.get((DEFAULT.scoring.scorer, DEFAULT.heads.ranker), [])
        plain = [rows.get((name, NONE), []) for name in ("tfidf", "random")]
        cells = [
            ", ".join(name for name in best if name != NONE),
            *(str(_over_seeds(each, "precision") or "") for each in (rows[best], default, *plain)),
        ]
        yield f"| {world} | {' | '.join(cells)} |"
        for (scorer, ranker), of_arm in rows.items():
            by_chance = rows.get((scorer, RANDOM_HEADS))
            if ranker not in (NONE, RANDOM_HEADS) and by_chance is not None:
                gain = _gain(of_arm, by_chance)
                if gain is not None and gain.n > 1:
                    tally.setdefault(ranker, Counter())[gain.shows] += 1
    yield ""
    for ranker, counts in tally.items():
        yield (
            f"- {_of(ranker)} against random heads, over worlds and scorers: better in "
            f"{counts[1]} of {counts.total()}, worse in {counts[-1]}, no difference shown in "
            f"{counts[0]}."
        )
    yield ""


def _answers(rows: Mapping[tuple[str, str], list[Choice]]) -> Iterator[str]:
    """Each scorer with task heads against TF-IDF and against itself with random heads."""
    tfidf = rows.get(("tfidf", NONE))
    for (scorer, ranker), of_arm in sorted(rows.items()):
        if ranker in (NONE, RANDOM_HEADS):
            continue
        said = []
        for what, other in (("TF-IDF", tfidf), ("random heads", rows.get((scorer, RANDOM_HEADS)))):
            if other is not None and (gain := _gain(of_arm, other)) is not None:
                said.append(f"{_word(gain)} than {what} by {gain.mean:+.3f} ({_bounds(gain)})")
        if said:
            yield f"- {scorer} with {_of(ranker)}: {'; '.join(said)}."
    yield ""


def _bar(rows: Mapping[tuple[str, str], list[Choice]]) -> Iterator[str]:
    """Which of those whose heads were ranked are far above TF-IDF, and above random heads."""
    tfidf = rows.get(("tfidf", NONE))
    tried: dict[str, bool] = {}
    for (scorer, ranker), of_arm in rows.items():
        by_chance = rows.get((scorer, RANDOM_HEADS))
        if ranker in (NONE, RANDOM_HEADS) or by_chance is None or tfidf is None:
            continue
        over_words, over_chance = _differences(of_arm, tfidf), _differences(of_arm, by_chance)
        if len(over_chance) > 1:
            tried[f"{scorer} with {_of(ranker)}"] = bool(
                np.mean(over_words) >= OVER_TFIDF and np.mean(over_chance) > 2 * sem(over_chance)
            )
    if tried:
        passed = [arm for arm, passes in tried.items() if passes]
        yield (
            f"At least {OVER_TFIDF:g} above TF-IDF, and above random heads by more than two "
            f"standard errors: {', '.join(passed) or f'none of {len(tried)}'}.\n"
        )


def _trained(name: str, study: Study, folder: Path) -> Iterator[str]:
    runs, metric, higher_is_better = arms.read(folder)
    lines = arm_lines(runs, higher_is_better)
    yield from _title(name, study, folder, {run.seed for run in runs})
    picture.draw(lines, metric, higher_is_better, folder / picture.PICTURE)
    yield f"![AER against {metric}](evidence/{name}/{picture.PICTURE})\n"
    yield f"| arm | {metric} | retention | over random data | over the best | AER | parameters |"
    yield "|---|---|---|---|---|---|---|"
    for line in lines:
        moved = [run.parameters for run in runs if run.arm == line.arm and run.parameters]
        cells = [
            str(line.quality or ""),
            str(line.retention or ""),
            *(
                f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" if gain else ""
                for gain in (line.over_random, line.over_best)
            ),
            f"{line.aer:.2f}" if line.aer is not None else "",
            f"{moved[0]:,}" if moved else "",
        ]
        failed = f" ({line.failed} of {line.runs} failed)" if line.failed else ""
        on_it = " (front)" if line.on_front else ""
        yield f"| {line.arm.label}{on_it}{failed} | {' | '.join(cells)} |"
    yield f"\nfront: {front(lines)}.\n"
    if higher_is_better:
        yield from _cheapest({line.arm.label: (line.quality, line.aer) for line in lines})
    asked = ""
    for answer in answers(runs, higher_is_better):
        if answer.question != asked:
            asked = answer.question
            yield f"\n{asked}\n"
        yield f"- {answer.words}"
    yield ""


def _tuned(name: str, study: Study, folder: Path) -> Iterator[str]:
    found = list(tuning.read(folder))
    by_variant: dict[str, dict[int, Trained]] = {}
    for each in found:
        by_variant.setdefault(each.variant, {})[each.seed] = each
    yield from _title(name, study, folder, {each.seed for each in found})
    points = {
        variant: Point(
            mean_interval([each.quality for each in of.values()]),
            mean_interval([each.retention for each in of.values()]),
            sum(each.aer for each in of.values()) / len(of),
        )
        for variant, of in by_variant.items()
    }
    draw_trained(points, folder / "trained.png")
    yield f"![Exact match and retention against AER](evidence/{name}/trained.png)\n"
    full, first = by_variant.get(EVERYTHING), next(iter(by_variant))
    against, what = (full, EVERYTHING) if full else (by_variant[first], first)
    searched = any(each.search_seconds for each in found)
    one_rate = len({each.learning_rate for each in found}) == 1
    yield (
        f"Exact match on the target and on the old skills; gain: over {what}, paired by seed. "
        + (
            "The learning rate is the best on a validation split; the AER is without that search, "
            "whose seconds stand beside.\n"
            if searched
            else "One learning rate for all.\n"
            if one_rate
            else "\n"
        )
    )
    yield "| trained | exact match | gain | old skills | AER | parameters | rates | search |"
    yield "|---|---|---|---|---|---|---|---|"
    for variant, of in by_variant.items():
        gain = mean_interval([of[seed].quality - against[seed].quality for seed in sorted(of)])
        rates = sorted({each.learning_rate for each in of.values()})
        cells = [
            str(points[variant].quality),
            "" if variant == what else f"{gain.mean:+.3f} ({_bounds(gain)})",
            str(points[variant].retention),
            f"{points[variant].aer:.2f}",
            f"{moved:,}" if (moved := next(iter(of.values())).parameters) else "",
            ", ".join(f"{rate:g}" for rate in rates),
            f"{sum(each.search_seconds for each in of.values()) / len(of):.0f} s",
        ]
        yield f"| {variant} | {' | '.join(cells)} |"
    yield ""
    if full:
        reached = [
            variant
            for variant, point in points.items()
            if point.quality.mean >= points[EVERYTHING].quality.mean + OVER_FULL
            and point.retention.mean >= KEPT
        ]
        yield (
            f"With {OVER_FULL:g} over {EVERYTHING} on the target and {KEPT:g} on the old skills: "
            f"{'; '.join(reached) or 'none'}.\n"
        )
    yield from _cheapest({name: (point.quality, point.aer) for name, point in points.items()})


def _whole_jobs(name: str, study: Study, folder: Path) -> Iterator[str]:
    found = list(jobs.read(folder))
    by_name: dict[str, dict[int, Job]] = {}
    for job in found:
        by_name.setdefault(job.name, {})[job.seed] = job
    first = next(iter(by_name))
    yield from _title(name, study, folder, {job.seed for job in found})
    yield f"Exact match on the target and on the old skills; gain: over {first}, paired by seed.\n"
    yield "| job | exact match | gain | old skills | clean of chosen | AER | of it selection |"
    yield "|---|---|---|---|---|---|---|"
    cost: dict[str, tuple[Interval | None, float | None]] = {}
    for job_name, of in by_name.items():
        gain = mean_interval(
            [job.quality - by_name[first][seed].quality for seed, job in of.items()]
        )
        quality = mean_interval([job.quality for job in of.values()])
        aer = sum(job.aer for job in of.values()) / len(of)
        cost[job_name] = (quality, aer)
        cells = [
            str(quality),
            "" if job_name == first else f"{gain.mean:+.3f} ({_bounds(gain)})",
            str(mean_interval([job.retention for job in of.values()])),
            f"{sum(job.clean for job in of.values()) / sum(j.selected for j in of.values()):.3f}",
            f"{aer:.2f}",
            f"{sum(job.selection_share for job in of.values()) / len(of):.0%}",
        ]
        yield f"| {job_name} | {' | '.join(cells)} |"
    yield ""
    yield from _cheapest(cost)


def _cheapest(arms: Mapping[str, tuple[Interval | None, float | None]]) -> Iterator[str]:
    """What costs least of what is about as good as the best; the base costs nothing and is none."""
    known = {
        name: (quality.mean, aer)
        for name, (quality, aer) in arms.items()
        if quality is not None and aer is not None
    }
    if not known:
        return
    best = max(quality for quality, _ in known.values())
    near = {name: pair for name, pair in known.items() if pair[0] >= best - ABOUT_AS_GOOD}
    name = min(near, key=lambda each: near[each][1])
    quality, aer = near[name]
    yield (
        f"Cheapest within {ABOUT_AS_GOOD:g} of the best mean ({best:.3f}): {name}, {quality:.3f} "
        f"at AER {aer:.2f}.\n"
    )


def _title(name: str, study: Study, folder: Path, seeds: set[int]) -> Iterator[str]:
    yield f"## {name}\n"
    many = f"{len(seeds)} seeds" if len(seeds) > 1 else "One seed: a direction, and no more"
    made = folder / MACHINE
    where = f" {json.loads(made.read_text())['machine']}." if made.exists() else ""
    yield f"{study.about} {many}.{where}\n"
    yield f"```sh\npython -m benchmarks.evidence --study {name} --seeds {len(seeds)}\n```\n"


def _by_arm(found: Sequence[Choice]) -> dict[tuple[str, str], list[Choice]]:
    """Choices by scorer and ranker; the draws of random heads are one ranker."""
    rows: dict[tuple[str, str], list[Choice]] = {}
    for choice in found:
        ranker = RANDOM_HEADS if choice.ranker.startswith(DRAW) else choice.ranker
        rows.setdefault((choice.scorer, ranker), []).append(choice)
    return rows


def _of(ranker: str) -> str:
    """The heads that it chose, in words: a label may say it itself, such as "all heads"."""
    return ranker if ranker.endswith("heads") else f"{ranker} heads"


def _seed_means(of_arm: Sequence[Choice], what: str) -> dict[int, float]:
    by_seed: dict[int, list[float]] = {}
    for choice in of_arm:
        value = getattr(choice, what)
        if value is not None:
            by_seed.setdefault(choice.seed, []).append(value)
    return {seed: sum(values) / len(values) for seed, values in by_seed.items()}


def _over_seeds(of_arm: Sequence[Choice], what: str) -> Interval | None:
    means = _seed_means(of_arm, what)
    return mean_interval(list(means.values())) if means else None


def _mean_precision(of_arm: Sequence[Choice]) -> float:
    return sum(choice.precision for choice in of_arm) / len(of_arm)


def _differences(a: Sequence[Choice], b: Sequence[Choice]) -> list[float]:
    """Of precision, by seed."""
    first, second = _seed_means(a, "precision"), _seed_means(b, "precision")
    return [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]


def _gain(a: Sequence[Choice], b: Sequence[Choice]) -> Interval | None:
    """Of precision, paired by seed."""
    differences = _differences(a, b)
    return mean_interval(differences) if differences else None


def _precisions(found: Sequence[Choice]) -> dict[str, dict[tuple[str, str], Interval]]:
    """World -> (scorer, ranker) -> precision over seeds."""
    by_world: dict[str, dict[tuple[str, str], Interval]] = {}
    for world in dict.fromkeys(choice.world for choice in found):
        rows = _by_arm([choice for choice in found if choice.world == world])
        by_world[world] = {
            arm: interval
            for arm, of_arm in rows.items()
            if (interval := _over_seeds(of_arm, "precision")) is not None
        }
    return by_world


def _word(gain: Interval) -> str:
    if gain.n == 1:
        return f"one seed shows nothing; {'better' if gain.mean > 0 else 'not better'}"
    return {1: "better", 0: "not shown to be better", -1: "worse"}[gain.shows]


def _bounds(interval: Interval) -> str:
    return f"{interval.low:+.3f} to {interval.high:+.3f}" if interval.n > 1 else "one seed"
