"""What all sections of the settings are made of: the model that forbids unknown keys, numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]
ShareOrZero = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Positive | Literal["auto"]
"""A learning rate; auto: found on the proxy set."""
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""As numpy takes one."""
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False)]


def _in_order(schema: dict[str, Any]) -> None:
    """Prefect's database sorts keys; its form goes by this."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Section(BaseModel):
    """A mapping in the settings file."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_in_order,
        # of sections too, which Prefect's form would show without a name
        field_title_generator=lambda name, _: name.replace("_", " ").capitalize(),
    )
