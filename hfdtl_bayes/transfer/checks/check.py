"""What every check returns: a status, a message in plain words, a table, a figure on demand, a recommendation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Status(StrEnum):
    """How a check came out."""

    PASS = "pass"
    WARN = "warn"
    """Worth knowing, and no reason against use by itself."""
    FAIL = "fail"
    CANNOT_SAY = "cannot_say"
    """What the check needs is not there; nothing follows, least of all that all is well."""


@dataclass(frozen=True, eq=False)
class Check:
    """One check.

    Attributes
    ----------
    name : str
    status : Status
    message : str
        What was found, in plain words.
    recommendation : str
        What to do about it; empty where nothing is to be done.
    table : DataFrame
        The numbers behind the message.
    draw : callable, optional
        Draws the figure into axes.
    """

    name: str
    status: Status
    message: str
    recommendation: str = ""
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    draw: Callable[[Axes], None] | None = None

    @property
    def passed(self) -> bool:
        """True for `pass` and `warn`."""
        return self.status in (Status.PASS, Status.WARN)

    def figure(self) -> Figure | None:
        """Return the figure, made now; None where there is nothing to draw."""
        if self.draw is None:
            return None
        from matplotlib.figure import Figure  # noqa: PLC0415  (loaded on first use)

        figure = Figure(figsize=(7.0, 3.5), layout="constrained")
        axes = figure.subplots()
        self.draw(axes)
        axes.set_title(f"{self.name}: {self.status}", loc="left")
        return figure

    def as_dict(self) -> dict[str, Any]:
        """Return the check as plain data for JSON; what is not finite becomes None."""
        return {
            "name": self.name,
            "status": str(self.status),
            "passed": self.passed,
            "message": self.message,
            "recommendation": self.recommendation,
            "table": records(self.table),
        }


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as plain data for JSON; what is not finite becomes None."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return [{str(k): plain(v) for k, v in row.items()} for row in table.to_dict(orient="records")]
