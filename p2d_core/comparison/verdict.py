"""What a comparison says, in words made from paired tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from p2d_core.comparison.arms import BASE, BASELINES, EVERYTHING, NONE, RANDOM, Arm, ArmRun
from p2d_core.comparison.statistics import Interval, mean_interval, paired_difference

ON_FRONT = "Which arms are on the Pareto front of AER and quality?"
CONTROLS = (RANDOM, "bottom", "layer")
"""Rankers whose heads are not those that the task needs."""


@dataclass(frozen=True, slots=True)
class ArmLine:
    """An arm over its seeds."""

    arm: Arm
    runs: int
    failed: int
    """Of the runs."""
    quality: Interval | None
    retention: Interval | None
    aer: float | None
    """Mean; None for arms that the AER does not apply to."""
    over_random: Interval | None
    """Against the arm with random data and all else equal; above 0 is better."""
    over_best: Interval | None
    """Against the arm with the best mean quality."""
    on_front: bool
    """No other arm is as good for less, or better for as much."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Mean of every metric that was measured on the target."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A question that two arms answer."""

    question: str
    a: Arm
    b: Arm
    gain: Interval
    """Of a over b, in the metric, above 0 is better."""

    @property
    def words(self) -> str:
        """yes, no or not shown, with the figures."""
        said = {1: "yes", 0: "not shown", -1: "no, it is worse"}[self.gain.shows]
        return (
            f"{said} ({self.gain.mean:+.3f}, {self.gain.low:+.3f} to {self.gain.high:+.3f}"
            f"{', one seed' if self.gain.n == 1 else ''}; {self.a.label} against {self.b.label})"
        )


def arm_lines(runs: Sequence[ArmRun], higher_is_better: bool) -> list[ArmLine]:
    """A line an arm, the best first; arms of which every run failed come last."""
    by_arm = _by_arm(runs)
    means = {arm: _quality(each) for arm, each in by_arm.items()}
    aers = {arm: _mean([run.aer for run in each]) for arm, each in by_arm.items()}
    sign = 1 if higher_is_better else -1
    known = {arm: sign * each.mean for arm, each in means.items() if each is not None}
    best = max(known, key=lambda arm: known[arm]) if known else None
    lines = []
    for arm, each in by_arm.items():
        retained = [run.retention for run in each if run.retention is not None]
        lines.append(
            ArmLine(
                arm=arm,
                runs=len(each),
                failed=sum(run.failed for run in each),
                quality=means[arm],
                retention=mean_interval(retained) if retained else None,
                aer=aers[arm],
                over_random=_gain(by_arm, arm, _like(by_arm, arm, scorer=RANDOM), higher_is_better),
                over_best=_gain(by_arm, arm, best, higher_is_better),
                on_front=arm in known
                and not any(
                    known[other] >= known[arm]
                    and (aers[other] or 0) <= (aers[arm] or 0)
                    and (known[other], -(aers[other] or 0)) != (known[arm], -(aers[arm] or 0))
                    for other in known
                ),
                metrics=_means([run.metrics for run in each if not run.failed]),
            )
        )
    return sorted(lines, key=lambda line: -known.get(line.arm, float("-inf")))


def further_metrics(lines: Sequence[ArmLine], metric: str) -> list[str]:
    """Names of those that were measured beside the comparison's own and the loss."""
    names = dict.fromkeys(name for line in lines for name in line.metrics)
    return [name for name in names if name not in (metric, "loss")]


def answers(runs: Sequence[ArmRun], higher_is_better: bool) -> list[Answer]:
    """What the arms that are there can answer; a question without its two arms is not asked."""
    by_arm = _by_arm(runs)
    found: list[Answer] = []

    def ask(question: str, a: Arm, b: Arm | None) -> None:
        gain = _gain(by_arm, a, b, higher_is_better)
        if gain is not None and b is not None:
            found.append(Answer(question, a, b, gain))

    for arm in sorted(by_arm):
        if arm.of.scorer in (BASE, EVERYTHING, *BASELINES) or arm.of.ranker in CONTROLS:
            continue
        for baseline in BASELINES:
            other = _like(by_arm, arm, scorer=baseline)
            ask(f"Does {arm.scorer} choose better data than {baseline}?", arm, other)
    for arm in sorted(by_arm):
        if arm.ranker == NONE or arm.of.ranker in CONTROLS:
            continue
        if arm.of.adaptation != "heads":
            role = "for choosing data"
        else:
            role = "for both" if arm.of.scores_by_heads else "for tuning"
        other = _like(by_arm, arm, ranker=RANDOM)
        ask(f"Do {arm.ranker} heads beat random heads {role}?", arm, other)
    everything = next((arm for arm in by_arm if arm.scorer == EVERYTHING), None)
    for arm in sorted(by_arm):
        is_ours = arm.of.adaptation == "heads" and arm.of.ranker not in CONTROLS
        if is_ours and arm.of.scorer not in BASELINES:
            ask("Is it better than full fine-tuning on everything?", arm, everything)
    order = list(dict.fromkeys(answer.question for answer in found))
    return sorted(found, key=lambda answer: order.index(answer.question))


def front(lines: Sequence[ArmLine]) -> str:
    """Which arms no other one is as good as for less, from the cheapest, in words."""
    on_it = sorted(
        (line for line in lines if line.on_front and line.aer is not None and line.quality),
        key=lambda line: line.aer or 0,
    )
    if not on_it:
        return "no arm has both an AER and a quality"
    named = [
        f"{line.arm.label} ({line.quality.mean:.3f} at AER {line.aer:.2f})"
        for line in on_it
        if line.quality
    ]
    ranked = [
        line
        for line in on_it
        if line.arm.of.scores_by_heads and line.arm.of.ranker not in (NONE, *CONTROLS)
    ]
    return "; ".join(named) + ("" if ranked else "; none that chooses by ranked task heads")


def _like(
    by_arm: Iterable[Arm], arm: Arm, *, scorer: str | None = None, ranker: str | None = None
) -> Arm | None:
    """The arm with that scorer or ranker and all else equal, the share of heads too; or, of one
    that looks at no head, the one without a ranker."""

    def is_control(other: Arm) -> bool:
        of = other.of
        return (of.ranker, of.head_fraction) == (ranker, arm.of.head_fraction)

    def alike(other: Arm, of_ranker: bool) -> bool:
        return (
            (other.of.scorer == scorer if scorer else other.scorer == arm.scorer)
            and (other.adaptation, other.fraction) == (arm.adaptation, arm.fraction)
            and of_ranker
        )

    known = list(by_arm)
    for other in known:
        if alike(other, is_control(other) if ranker else other.ranker == arm.ranker):
            return other
    return next((other for other in known if alike(other, other.ranker == NONE)), None)


def _by_arm(runs: Sequence[ArmRun]) -> dict[Arm, list[ArmRun]]:
    by_arm: dict[Arm, list[ArmRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    return by_arm


def _quality(runs: Sequence[ArmRun]) -> Interval | None:
    values = [run.quality for run in runs if run.quality is not None]
    return mean_interval(values) if values else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _gain(
    by_arm: dict[Arm, list[ArmRun]], a: Arm, b: Arm | None, higher_is_better: bool
) -> Interval | None:
    if b is None or a == b:
        return None
    first, second = ({run.seed: run.values for run in by_arm[arm]} for arm in (a, b))
    return (
        paired_difference(first, second) if higher_is_better else paired_difference(second, first)
    )


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in measured for name in each)
    return {
        name: float(mean)
        for name in names
        if (mean := _mean([each.get(name) for each in measured])) is not None
    }
