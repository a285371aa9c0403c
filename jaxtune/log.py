"""What a run writes while it runs: metrics.jsonl, TensorBoard events, W&B, and lines or a bar on the terminal."""

import json
import os
import time
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError


class Metrics:
    """`metrics.jsonl`, one object a line, and its mirrors.

    Lines after `step` are dropped when a run goes on from there, so the file is what an undisturbed run writes.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False, wandb: bool = False, config=None):
        self.path = folder / "metrics.jsonl"
        self._truncate(step)
        self.file = self.path.open("a")
        self.writer = self.wandb = None
        if tensorboard:
            self.writer = Events(folder / "tensorboard", step + 1)
        if wandb:
            try:
                import wandb as library
            except ImportError:
                raise UserError("log.wandb needs the package: pip install 'jaxtune[wandb]'.") from None
            self.wandb = library.init(dir=str(folder), id=folder.name, resume="allow", config=config)

    def _truncate(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line, values in _lines(self.path) if values["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as f:
            f.writelines(kept)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


class Events:
    """A TensorBoard event file of scalars, written as they come; those from `purge_step` on in older files are void.

    tensorboardX's own writer hands them to a thread, which dies on a full disk: the run then waits for it for ever.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        self._event, self._scalar, self._writer = Event, scalar, EventsWriter(str(folder / "events"))
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(step, summary=self._scalar(name, value))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **what))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _lines(path: Path) -> list[tuple[str, dict]]:
    """The whole lines of a metrics file; a torn last line is left out."""
    pairs = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            pairs.append((line, json.loads(line)))
        except json.JSONDecodeError:
            continue
    return pairs


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl."""
    return [values for _, values in _lines(folder / "metrics.jsonl")]


class Progress:
    """A bar with loss, lr, tokens/s and ETA on a terminal; elsewhere one line at each logged step."""

    def __init__(self, steps: int, start: int, *, bar: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(soft_wrap=True, highlight=False)
        self.steps, self.began, self.bar = steps, time.monotonic(), None
        if bar and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("compiling", total=steps, completed=start)
            self.bar.start()

    def update(self, step: int, lines: dict[str, dict[str, float]]) -> None:
        """Called at each logged step, with what was logged of each run."""
        losses = {name: line["train/loss"] for name, line in lines.items()}
        speed = sum(line["train/tokens_per_second"] for line in lines.values())
        low = min(losses, key=losses.get)
        if len(lines) == 1:
            text = f"loss {losses[low]:.4f}  lr {lines[low]['train/lr']:.2e}"
        else:
            text = f"{len(lines)} runs  loss {losses[low]:.4f} ({low}) to {max(losses.values()):.4f}"
        text += f"  {speed:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        else:
            self.console.print(f"step {step}/{self.steps}  {text}", markup=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
