"""`jaxtune sweep --find-lr`: bracket the learning rate by the eval loss of short runs.

This is not a range test, which reads a rate off one run of growing rate: that loss lags and is not of held-out data
(Smith 2017, arXiv:1506.01186, section 3.3). Here each rate has its own run, with the whole schedule in few steps,
all of a round in one step of the sweep.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtune.errors import RunFailed, UserError
from jaxtune.run.points import Point

WIDE = math.sqrt(10)  # ratio of neighbouring rates in the first rounds; the last round takes its square root
MOST_ROUNDS = 6
FLAT = 0.005  # losses within this share of the best count as equal


def find_lr(sweep: Any, options: Any) -> None:
    """Find the rate, say why, and write the config with it if asked to.

    Raises:
        UserError: there is nothing to evaluate on, or the file to write exists.
        RunFailed: no rate was found.
    """
    from jaxtune.files import atomic_write_text, refuse_existing
    from jaxtune.report.sweep_table import sweep_rows
    from jaxtune.run.workdir import explained_disk

    cfg = options.resolve({})
    if not cfg.data.eval and not cfg.data.eval_fraction:
        raise UserError("--find-lr compares eval losses: give data.eval or data.eval_fraction")
    out = options.write_config
    if out is not None and (out.suffix != ".py" or not out.parent.is_dir()):
        raise UserError(f"--write-config={out}: expected a new .py file in a directory that is there")
    if out is not None:
        refuse_existing(out)
    steps = options.find_steps or max(20, sweep.steps_of(Point("", {}, cfg)) // 10)
    short = {"train.steps": str(steps), "train.epochs": "none", "train.eval_every": str(steps)}
    flags = [f"--config.{path}={text}" for path, text in short.items()]
    sweep = replace(sweep, resolve=lambda more: options.resolve({**short, **more}), argv=[*sweep.argv, *flags])
    rates = [_round(cfg.optim.lr * WIDE**i) for i in (-2, -1, 0, 1, 2)]
    if options.dry_run:
        sweep.show(sweep.check([{"optim.lr": rate} for rate in rates]))
        return
    with explained_disk(sweep.folder, "What is finished is kept."):
        for number in range(MOST_ROUNDS):
            print(f"round {number + 1}, {steps} steps: {', '.join(f'{rate:g}' for rate in rates)}")
            sweep.add(sweep.check([{"optim.lr": rate} for rate in rates]))
            sweep.run()
            losses = {float(row["lr"]): _loss(row) for row in sweep_rows(sweep.folder)}
            rates = next_rates(losses)
            if not rates:
                break
        sweep.tell()
    best, why = conclude(losses)
    print(f"\n{why}\nShort runs favour higher rates than long ones: in doubt, take the lower of two that are equal.")
    if out is not None:
        atomic_write_text(out, _config_file(cfg, best, why, out))
        print(f"config: {out}")


def next_rates(losses: dict[float, float]) -> list[float]:
    """The rates to try next: beyond the best if it is at an end, else between it and its neighbours; [] when done.

    Args:
        losses: learning rate -> eval loss, infinite where it diverged.

    Raises:
        RunFailed: all of them diverged, however low.
    """
    rates = sorted(losses)
    best = min(rates, key=lambda rate: (losses[rate], rate))
    if math.isinf(losses[best]):
        if rates[0] < 1e-9:
            raise RunFailed(f"Every rate from {rates[0]:g} to {rates[-1]:g} diverged; look at the data.")
        return [_round(rates[0] / WIDE**i) for i in (3, 2, 1)]
    at = rates.index(best)
    if _lowest_as_good(rates, losses, at) == 0:
        return [_round(rates[0] / WIDE**i) for i in (2, 1)]
    if at == len(rates) - 1:
        return [_round(best * WIDE**i) for i in (1, 2)]
    below, above = rates[at - 1], rates[at + 1]
    middles = [_round(math.sqrt(a * b)) for a, b in ((below, best), (best, above)) if b / a > WIDE * 0.9]
    return [rate for rate in middles if rate not in losses]


def conclude(losses: dict[float, float]) -> tuple[float, str]:
    """(the rate to take, the reason in words): the lowest of the adjacent rates that are as good as the best."""
    rates = sorted(losses)
    best = min(rates, key=lambda rate: (losses[rate], rate))
    if math.isinf(losses[best]):
        raise RunFailed("Every rate diverged; look at the data.")
    at = _lowest_as_good(rates, losses, rates.index(best))
    chosen = rates[at]
    lines = [f"optim.lr={chosen:g}: eval loss {losses[chosen]:.4f}."]
    if chosen != best:
        lines.append(f"{best:g} has {losses[best]:.4f}, no more than {FLAT:.1%} better.")
    if at:
        lines.append(f"Below, {rates[at - 1]:g} learns less in the same steps ({losses[rates[at - 1]]:.4f}).")
    else:
        lines.append("No lower rate was tried.")
    above = rates[rates.index(best) + 1 :]
    if not above:
        lines.append("No higher rate was tried.")
    elif math.isinf(losses[above[0]]):
        lines.append(f"Above, {above[0]:g} diverged.")
    else:
        lines.append(f"Above, {above[0]:g} is worse ({losses[above[0]]:.4f}).")
    return chosen, " ".join(lines)


def _lowest_as_good(rates: list[float], losses: dict[float, float], at: int) -> int:
    """The index of the lowest rate next to the one at `at` that is as good."""
    best = losses[rates[at]]
    while at and losses[rates[at - 1]] <= best * (1 + FLAT):
        at -= 1
    return at


def _round(rate: float) -> float:
    """Round to two significant digits."""
    return float(f"{rate:.1e}")


def _loss(row: dict[str, Any]) -> float:
    failed = row["status"] != "finished" or row["eval_loss"] is None
    return math.inf if failed else row["eval_loss"]


def _config_file(cfg: Any, best: float, why: str, out: Path) -> str:
    """The text of a config file with the given settings and the chosen rate."""
    from jaxtune import config
    from jaxtune.run import propose

    values = dict(config.overrides(cfg)) | {"optim.lr": best}
    choices = [propose.Choice(path, values[path]) for path in config.BY_PATH if path in values]
    choices = [c._replace(why="by --find-lr") if c.path == "optim.lr" else c for c in choices]
    command = f"jaxtune train --config={out} --workdir=runs/{out.stem}"
    return propose.write_config(propose.Proposal(tuple(choices)), "As given, with the rate found.", command, [why])
