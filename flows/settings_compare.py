"""The section `compare` of the settings: which arms are held against each other."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from flows.settings_base import Rate, Section, Seed, Share


class Choice(Section):
    """A ranker, scorer or adaptation of a comparison."""

    name: str
    """Its name."""
    options: dict[str, Any] = {}
    """Its settings; if it is the run's own choice those of the run, unless it is given some."""
    label: str = ""
    """What it is called in the comparison; its name if empty."""
    learning_rate: Rate | None = None
    """Adaptations only: peak learning rate; that of the run (full: of arms) if empty."""
    fraction: Share | None = None
    """Rankers only: share of all query heads that become task heads; that of the run if empty."""

    @property
    def shown(self) -> str:
        return self.label or self.name


TAKEN = {"base", "everything", "-"}
"""What tables call the base model, training on everything, and an arm without a ranker."""
ONLY_OF = {"learning_rate": "adaptations", "fraction": "rankers"}


def _choice(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


Choices = Annotated[
    tuple[Annotated[Choice, BeforeValidator(_choice, json_schema_input_type=str | Choice)], ...],
    Field(min_length=1, validate_default=True),
]


class CompareSettings(Section):
    """The grid of `p2d compare`; `p2d adapt` does not look at it."""

    rankers: Choices = ("frobenius", "random")  # type: ignore[assignment]
    """Names, or {name, options, label, fraction}."""
    scorers: Choices = ("head-filter", "tfidf", "random")  # type: ignore[assignment]
    """Names, or {name, options, label}."""
    adaptations: Choices = ("heads", "full")  # type: ignore[assignment]
    """Names, or {name, options, label, learning_rate}."""
    fractions: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None
    """Shares of the corpus that training sees; selection.fraction if empty."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Of every draw and of training, in place of the run's seed; the data stay the same."""
    everything: bool = True
    """Also full fine-tuning on the whole corpus; the AER is then against its measured time."""

    @field_validator("rankers", "scorers", "adaptations")
    @classmethod
    def _looked_at(cls, choices: tuple[Choice, ...], info: ValidationInfo) -> tuple[Choice, ...]:
        for field, of in ONLY_OF.items():
            for choice in choices if info.field_name != of else ():
                if getattr(choice, field) is not None:
                    raise ValueError(f"{choice.shown!r} has a {field}, which is of {of} alone")
        return choices

    @field_validator("rankers", "scorers", "adaptations")
    @classmethod
    def _told_apart(cls, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        shown = [choice.shown for choice in choices]
        for name in set(shown) & TAKEN:
            raise ValueError(f"one of them is called {name!r}, which is another arm's: rename it")
        for one, name in zip(choices, shown, strict=True):
            if any(name == other.shown and one != other for other in choices):
                raise ValueError(f"two of them are called {name!r}; give each a label")
        return choices
