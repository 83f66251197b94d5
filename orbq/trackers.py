"""Records of a training run in the tools people watch: TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbq import devices
from orbq.config import Config
from orbq.errors import InputError

if TYPE_CHECKING:
    from orbq.reporter import Reporter, Speed

PROJECT = "orbq"


class Tracker:
    """Tells numbers by name and step; the steps of a later stage follow those of the one before."""

    def __init__(self) -> None:
        self.before: dict[str, int] = {}  # steps of all stages before each

    def write(self, values: dict[str, float], step: int) -> None:
        """Record values at a step."""

    def close(self) -> None:
        """No more will come."""

    def _at(self, stage: str, step: int) -> int:
        return self.before.get(stage, 0) + step

    def started(self, facts: dict[str, Any]) -> None:
        """Take note of the stages, of which a run that is gone on with may have some behind it."""
        total = 0
        for stage, n_steps in facts.get("stages", {}).items():
            self.before[stage], total = total, total + n_steps

    def warned(self, text: str) -> None: ...

    def stepped(self, stage: str, step: int, n_steps: int, loss: float, speed: Speed) -> None:
        """The loss and how fast it goes."""
        values = {"loss": loss, "atoms_per_second": speed.atoms_per_second, "fill": speed.fill}
        self.write(values, self._at(stage, step))

    def validated(self, record: dict[str, Any]) -> None:
        """Everything that metrics.jsonl has."""
        numbers = {k: float(v) for k, v in record.items() if "/" in k}
        self.write(numbers, self._at(record["stage"], record["step"]))


class TensorBoard(Tracker):
    """Event files in ``tensorboard/`` of the run directory."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self.writer = SummaryWriter(str(Path(config.run.directory) / "tensorboard"))

    def write(self, values: dict[str, float], step: int) -> None:
        """Record values at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Put everything on disk."""
        self.writer.close()


class WandB(Tracker):
    """A run of Weights & Biases; its environment variables (WANDB_MODE, ...) say where."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        directory = Path(config.run.directory)
        self.run = wandb.init(
            project=PROJECT,
            name=directory.name,
            dir=str(directory),
            config=json.loads(config.model_dump_json()),
        )

    def write(self, values: dict[str, float], step: int) -> None:
        """Record values at a step."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def _missing(name: str) -> InputError:
    return InputError(
        f"run.log names {name!r}, which is not installed: pip install 'orbq[{name}]', or take it "
        "out of run.log"
    )


class Several:
    """Tells the same to several."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = list(reporters)

    def started(self, facts: dict[str, Any]) -> None:
        """See ``fit.Reporter``."""
        for reporter in self.reporters:
            reporter.started(facts)

    def stepped(self, stage: str, step: int, n_steps: int, loss: float, speed: Speed) -> None:
        """See ``fit.Reporter``."""
        for reporter in self.reporters:
            reporter.stepped(stage, step, n_steps, loss, speed)

    def validated(self, record: dict[str, Any]) -> None:
        """See ``fit.Reporter``."""
        for reporter in self.reporters:
            reporter.validated(record)

    def warned(self, text: str) -> None:
        """See ``fit.Reporter``."""
        for reporter in self.reporters:
            reporter.warned(text)


class _Late:
    """Trackers made when the run's directory has been claimed: nothing is written before."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.trackers: list[Tracker] = []

    def started(self, facts: dict[str, Any]) -> None:
        self.trackers = [TRACKERS[name](self.config) for name in self.config.run.log]
        for tracker in self.trackers:
            tracker.started(facts)

    def stepped(self, stage: str, step: int, n_steps: int, loss: float, speed: Speed) -> None:
        for tracker in self.trackers:
            tracker.stepped(stage, step, n_steps, loss, speed)

    def validated(self, record: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.validated(record)

    def warned(self, text: str) -> None: ...

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


@contextmanager
def with_trackers(config: Config, display: Reporter) -> Iterator[Reporter]:
    """``display`` and what ``run.log`` names. Raises InputError for what is not installed."""
    if not config.run.log or not devices.is_main():
        yield display
        return
    with ExitStack() as stack:
        late = _Late(config)
        stack.callback(late.close)
        yield Several([display, late])
