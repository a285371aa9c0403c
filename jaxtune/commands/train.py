"""`jaxtune train`: tune a model as a config says; start again to go on."""

import time
from pathlib import Path

from jaxtune.cli import Flag, parse
from jaxtune.errors import RunFailed, UserError

USAGE = """usage: jaxtune train --config=FILE.py [--config.section.key=value ...] --workdir=DIR [--dry-run]

Tune a model as the config says. The same command goes on with a run that was stopped."""

FLAGS = {
    "workdir": Flag("directory of the run; made if it is not there"),
    "dry-run": Flag(
        "make every check, show two rows with the trained tokens marked, and stop before compiling", bool, False
    ),
}


def main(argv: list[str]) -> None:
    began = time.time()
    cfg, options = parse(argv, FLAGS, usage=USAGE)
    if options.workdir is None and not options.dry_run:
        raise UserError("--workdir=DIR is missing: the directory of the run.")
    from jaxtune.config import notes
    from jaxtune.log import Progress

    workdir = None if options.workdir is None else Path(options.workdir).expanduser()
    clock = Clock(began)
    from jaxtune.commands import job

    if workdir is not None:
        job.check_workdir(workdir, cfg)
    job.use_compilation_cache()
    clock("imports")
    model = job.open_model(cfg)
    data = job.open_data(cfg, model.module)
    if workdir is not None:
        job.check_workdir(workdir, cfg, data.report.fingerprint)
    clock("data")
    progress = Progress(0, 0, bar=False)
    for line in [*data.report.lines(), *notes(cfg)]:
        progress.say(line)
    if cfg.data.max_length is None:
        progress.say(f"data.max_length is {data.length} by default (the model knows {model.module.spec.positions}).")
    j = job.build(cfg, model, data)
    clock("load")
    progress.say(str(j.counts))
    if workdir is not None:
        job.check_room(workdir, cfg, j)
    if options.dry_run:
        from rich.console import Console

        from jaxtune.data import render_plain, render_rows

        console = Console(soft_wrap=True)
        shown = (
            render_rows(data.train[0], data.tokenizer)
            if console.is_terminal
            else render_plain(data.train[0], data.tokenizer)
        )
        console.print(shown, markup=False, highlight=False)
        console.print(f"{j.steps} steps of {cfg.train.batch_size} rows; every check passed, nothing was compiled.")
        return
    from jaxtune.files import exclusive

    try:
        with exclusive(workdir):
            _run(cfg, argv, workdir, j, clock)
    except Exception as error:
        from jaxtune.loop import out_of_memory

        if not out_of_memory(error):
            raise
        rows = cfg.train.batch_size // cfg.train.grad_accum
        ways = "\n  ".join(job.remedies(cfg, rows, data.length))
        raise RunFailed(f"The device has not enough memory for this run. The cheapest remedies:\n  {ways}") from None


class Clock:
    """Seconds spent in each part of a run."""

    def __init__(self, began: float):
        self.last, self.parts = began, {}

    def __call__(self, part: str) -> None:
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now


def _run(cfg, argv, workdir: Path, j, clock: Clock) -> None:
    import json

    import jax

    from jaxtune import config, loop, tree
    from jaxtune.checkpoint import Checkpoints
    from jaxtune.commands import results
    from jaxtune.files import atomic_write_text
    from jaxtune.log import Metrics, Progress, read_metrics
    from jaxtune.parallel import shard_batch

    resolved = config.to_json(cfg, results.versions() | {"data": j.data.report.fingerprint})
    if not (workdir / "config.json").exists():  # before anything else, so that what follows is known as a run
        atomic_write_text(workdir / "config.json", resolved)
    checkpoints = Checkpoints(workdir / "checkpoints", cfg.train.keep, print)
    found = checkpoints.restore(j.state)
    state, counters = found or (j.state, None)
    start = int(state.step)
    if start > j.steps:
        raise UserError(
            f"The run in {workdir} has done {start} steps, and this config asks for {j.steps}; nothing was changed. "
            "Raise train.steps or train.epochs, or give another --workdir."
        )
    atomic_write_text(workdir / "config.json", resolved)
    progress = Progress(j.steps, start, bar=cfg.log.progress)
    if found:
        progress.say(f"Going on after step {start} of {j.steps}.")
    metrics = Metrics(
        workdir,
        start if found else -1,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
        config=json.loads(config.to_json(cfg)),
    )

    def put(batch):
        return shard_batch(batch, j.mesh)

    evaluate = generated = None
    if j.eval_batches is not None:
        evaluate = loop.make_evaluate(j.eval_step, j.frozen, j.eval_batches, put, cfg.train.eval_batches)
    if cfg.evaluate.json:
        from jaxtune.evaluate.json_fields import JsonEvaluation

        generated = JsonEvaluation(
            j.model.module, j.data.eval, j.data.tokenizer, cfg.evaluate.rows, cfg.evaluate.max_new_tokens
        )
        if not found:
            metrics.write(0, generated(tree.combine(state.trainable, state.member, j.frozen)))
    clock("setup")
    eval_every = cfg.train.eval_every or max(1, round(j.batches.steps_per_epoch))
    plan = loop.Plan(j.steps, cfg.log.every, eval_every, cfg.train.save_every, cfg.train.early_stop)
    try:
        result = loop.fit(
            state,
            j.frozen,
            j.step_fn,
            j.batches.batch,
            plan,
            put=put,
            checkpoints=checkpoints,
            metrics=metrics,
            progress=progress,
            lr_at=lambda step: float(cfg.optim.lr * j.shape(step)),
            evaluate=evaluate,
            counters=counters,
            places=j.batches.places,
        )
        clock("train")
        state = result.state
        if result.best and result.best["step"] != int(state.step):
            progress.say(f"The best evaluation was at step {result.best['step']:.0f}; its weights are the result.")
            state, _ = checkpoints.restore(state, int(result.best["step"]))
        params = tree.combine(state.trainable, state.member, j.frozen)
        if generated:
            last = read_metrics(workdir)
            if not any("eval/json_valid" in m and m["step"] == j.steps for m in last):
                metrics.write(j.steps, generated(params))
    finally:
        progress.close()
        metrics.close()
        checkpoints.close()
    clock("evaluate")
    jax.block_until_ready(params)
    results.finish(cfg, argv, workdir, j, params, result, clock, generated)
