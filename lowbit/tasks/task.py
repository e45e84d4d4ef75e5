"""What every task offers."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol


class Meter(Protocol):
    """Takes outputs batch by batch, and gives the figures of all of them together."""

    def update(self, reference: Any, output: Any, batch: Any) -> None:
        """Adds what the float model and the candidate returned for one batch of inputs."""

    def result(self) -> dict[str, float]:
        """The figures by name; NaN for one that nothing was seen for."""


class Task:
    """A task makes meters. Subclasses are frozen dataclasses of the task's settings.

    Attributes:
        name: as in `lowbit.tasks.TASKS`.
        elementwise: whether the elements of two outputs can be compared one by one. If not, there
            is no SQNR, no cosine and no largest error.
        objective: name of the figure that a search for schemes works on; None for the noise of
            the elements (SQNR).
    """

    name: ClassVar[str]
    elementwise: ClassVar[bool] = True
    objective: ClassVar[str | None] = None

    def meter(self) -> Meter:
        """A new meter."""
        raise NotImplementedError
