"""Logs of a run: metrics.jsonl with its mirrors and findings, and lines or a progress bar on the terminal."""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.files import atomic_write_text
from jaxtune.reading import parse_json
from jaxtune.train.watch import RunFinding, Watch

FINDINGS = "findings.jsonl"


class JsonLines:
    """A file of one object a line, each with its "step".

    Lines after `step` are dropped when a run is resumed there, so the file equals that of an uninterrupted run.

    Attributes:
        kept: the existing lines up to `step`.
    """

    def __init__(self, path: Path, step: int):
        self.kept: list[dict[str, Any]] = []
        if path.exists():
            pairs = [(line, values) for line, values in _lines(path) if values["step"] <= step]
            self.kept = [values for _, values in pairs]
            atomic_write_text(path, "".join(line for line, _ in pairs))
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Metrics:
    """`metrics.jsonl` and its mirrors: TensorBoard events, W&B. With a watch, its findings go to `findings.jsonl`."""

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        watch: Watch | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Mapping[str, Any] | None = None,
    ):
        self.watch, self.findings = watch, folder / FINDINGS
        self.wandb = _wandb_run(folder, config) if wandb else None  # first: it may be refused
        self.lines = JsonLines(folder / "metrics.jsonl", step)
        if watch is not None:
            self.kept = self.findings.read_text() if self.findings.exists() else ""
            for line in self.lines.kept:
                watch.see(line)
            self._keep_findings()
        self.writer = None
        if tensorboard:
            self.writer = Events(folder / "tensorboard", step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> list[RunFinding]:
        """Write a line; return the findings that are new with it."""
        self.lines.write(step, values)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)
        if self.watch is None:
            return []
        new = self.watch.see({"step": step, **values})
        self._keep_findings()
        return new

    def _keep_findings(self) -> None:
        text = "".join(json.dumps(finding.as_json()) + "\n" for finding in self.watch.findings)
        if text != self.kept:
            atomic_write_text(self.findings, text)
            self.kept = text

    def close(self) -> None:
        self.lines.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


class Events:
    """A TensorBoard event file of scalars, written as they come; those from `purge_step` on in older files are void.

    tensorboardX's own writer uses a thread, which dies on a full disk, and the run then waits for it for ever.
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


def _wandb_run(folder: Path, config: Any) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb needs the package: pip install 'jaxtune[wandb]'.") from None
    # The name of a folder is not unique, and a resumed run must find its own record.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    project = os.environ.get("WANDB_PROJECT", "jaxtune")
    return wandb.init(
        project=project, name=folder.resolve().name, dir=str(folder), id=identity, resume="allow", config=config
    )


def _lines(path: Path) -> list[tuple[str, dict]]:
    """The records of metrics.jsonl with their lines; incomplete or malformed lines are left out."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file.")
    pairs = []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:  # texts may hold other separators
        for number, line in enumerate(lines, 1):
            with contextlib.suppress(UserError):
                values = parse_json(line, f"{path}:{number}", halves=True)
                if isinstance(values, dict) and type(values.get("step")) is int and values["step"] >= 0:
                    pairs.append((line, values))
    return pairs


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl."""
    return [values for _, values in _lines(folder / "metrics.jsonl")]


class Progress:
    """On a terminal a bar with loss, lr, tokens/s and ETA, and a plot of the losses; elsewhere a line a logged step."""

    PLOT_LINES, LEAST_LINES = 10, 24  # of the plot, of a terminal that has room for it
    MOST_POINTS = 2000  # of a curve; beyond, every other point is dropped

    def __init__(self, steps: int, start: int, *, bar: bool = True, plot: bool = True, several: bool = False):
        """`several`: whether runs share a step; there is then one curve for each run."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
        self.steps, self.several, self.live = steps, several, None
        self.curves: dict[str, list[tuple[float, float]]] = {}
        if bar and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("compiling", total=steps, completed=start)
            self.plot = plot and self.console.height >= self.LEAST_LINES
            self.live = Live(get_renderable=self._shown, console=self.console, transient=True)
            self.live.start()

    def _shown(self) -> Any:
        if not self.plot or not any(len(points) > 1 for points in self.curves.values()):
            return self.bar
        from rich.console import Group

        from jaxtune.train.plot import plot

        return Group(plot(self.curves, self.steps, min(self.console.width, 100), self.PLOT_LINES), self.bar)

    def _add(self, step: int, lines: Mapping[str, Mapping[str, float]]) -> None:
        """Add points to the curves: train and eval loss of a single run, or the training losses of several."""
        for name, line in lines.items():
            for metric in ("train",) if self.several else ("train", "eval"):
                value = line.get(f"{metric}/loss", math.nan)
                if math.isfinite(value):
                    points = self.curves.setdefault(name if self.several else metric, [])
                    points.append((step, value))
                    if len(points) > self.MOST_POINTS:
                        del points[1::2]

    def recall(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Restore the curves of a resumed run from the lines of its metrics."""
        for line in lines:
            self._add(line["step"], {name: line})

    def update(self, step: int, lines: Mapping[str, Mapping[str, float]]) -> None:
        """Called at each logged step, with the metrics of each run."""
        self._add(step, lines)
        losses = {name: line["train/loss"] for name, line in lines.items()}
        speed = sum(line["train/tokens_per_second"] for line in lines.values())
        low = min(losses, key=losses.get)
        if not self.several:
            text = f"loss {losses[low]:.4f}  lr {lines[low]['train/lr']:.2e}"
        else:
            text = f"{len(lines)} runs  loss {losses[low]:.4f} ({low}) to {max(losses.values()):.4f}"
        text += f"  {speed:,.0f} tokens/s"
        if self.live:
            self.bar.update(self.task, completed=step, description=text)
        else:
            self.console.print(f"step {step}/{self.steps}  {text}", markup=False)

    def evaluated(self, step: int, lines: Mapping[str, Mapping[str, float]]) -> None:
        """Called after an evaluation, with its metrics for each run."""
        self._add(step, lines)
        for name, line in lines.items():
            self.say(f"step {step}  {name + '  ' if self.several else ''}eval loss {line['eval/loss']:.4f}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.live:
            self.live.stop()
