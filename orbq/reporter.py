"""What is told while a run trains; the terminal display is one listener, a tracker another."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Speed(NamedTuple):
    """atoms_per_second: real atoms, of all devices. fill: real over padded atoms. compilations: of
    the training step so far."""

    atoms_per_second: float
    fill: float
    compilations: int


class Reporter(Protocol):
    """What is told while training."""

    def started(self, facts: dict[str, Any]) -> None: ...
    def stepped(self, stage: str, step: int, n_steps: int, loss: float, speed: Speed) -> None: ...
    def validated(self, record: dict[str, Any]) -> None: ...
    def warned(self, text: str) -> None: ...


class Silent:
    """Tells nothing."""

    def started(self, facts: dict[str, Any]) -> None: ...
    def stepped(self, stage: str, step: int, n_steps: int, loss: float, speed: Speed) -> None: ...
    def validated(self, record: dict[str, Any]) -> None: ...
    def warned(self, text: str) -> None: ...
