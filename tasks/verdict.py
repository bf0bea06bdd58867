"""What a run's numbers say, in words: read by the terminal, the MLflow page and the report."""

from __future__ import annotations

from tasks.summary import QualitySummary, Summary

ARM_NAMES = {
    "base": "base model",
    "p2d": "P2D",
    "proxy": "proxy set alone",
    "random": "random subset",
    "full": "full fine-tuning",
}
TERM_NAMES = {
    "proxy": "proxy run",
    "heads": "head ranking",
    "scores": "scoring",
    "subset": "selection",
    "model": "training",
}


MOVED = {
    "heads": "task heads",
    "attention": "all attention",
    "lora": "LoRA",
    "full": "all parameters",
}
"""What an adaptation moves."""


def verdict(summary: Summary) -> list[tuple[str, str]]:
    """What the numbers say, in sentences, each with a colour: green, yellow, red or dim."""
    quality, of_heads = summary.quality, summary.trainable.adaptation == "heads"
    tuned = "the same heads" if of_heads else "the task heads"
    same = "the same heads" if of_heads else "the same adaptation"
    sentences = [_against_base(quality)]
    sentences += [
        _against(quality, arm, text)
        for arm, text in (
            ("proxy", f"{tuned} tuned on the proxy set alone, without the corpus"),
            ("random", f"a random subset of the same size with {same}"),
            ("full", "full fine-tuning on the whole corpus"),
        )
        if getattr(quality, arm) is not None
    ]
    if n_proxy := summary.trainable.proxy_samples:
        sentences.append(
            (f"Every arm that was trained saw the {n_proxy:,} proxy samples too.", "dim")
        )
    if quality.samples:
        noise = "One run on {n} evaluation samples: small differences can be chance."
        sentences.append((noise.format(n=f"{quality.samples:,}"), "dim"))
    return sentences


def gain(quality: QualitySummary, arm: str) -> float:
    """By how much P2D is better than an arm, in the metric's unit; negative: worse."""
    difference = quality.p2d - float(getattr(quality, arm))
    return difference if quality.higher_is_better else -difference


def times(speedup: float) -> str:
    """Such as 3.5x."""
    return f"{speedup:.1f}x" if speedup < 1000 else f"{speedup:,.0f}x"


def percent(part: float, whole: float) -> str:
    """Such as 12.5%; empty of nothing."""
    return f"{part / whole:.1%}" if whole else ""


def trained_on(arm: str, share: str, adaptation: str) -> str:
    """What moved in an arm, and on which data; ``share`` is that of the corpus, such as 10.0%."""
    moved, of_heads = MOVED.get(adaptation, adaptation), adaptation == "heads"
    return {
        "base": "nothing",
        "p2d": f"{moved}, {share} of the corpus",
        "proxy": f"{'same' if of_heads else 'task'} heads, none of the corpus",
        "random": f"{'same heads' if of_heads else moved}, {share} of the corpus",
        "full": "all parameters, whole corpus",
    }[arm]


def _against_base(quality: QualitySummary) -> tuple[str, str]:
    better_by = gain(quality, "base")
    if _same(quality, "base"):
        return "P2D leaves the base model's quality as it was.", "yellow"
    if better_by < 0:
        return f"P2D is WORSE than the base model, by {-better_by:.3f}.", "red"
    return f"P2D is better than the base model by {better_by:.3f}.", "green"


def _against(quality: QualitySummary, arm: str, what: str) -> tuple[str, str]:
    better_by = gain(quality, arm)
    if _same(quality, arm):
        return f"P2D is NOT better than {what}: the same.", "yellow"
    if better_by < 0:
        return f"P2D is NOT better than {what}: worse by {-better_by:.3f}.", "yellow"
    return f"P2D is better than {what} by {better_by:.3f}.", "green"


def _same(quality: QualitySummary, arm: str) -> bool:
    return abs(gain(quality, arm)) < 0.0005
