"""Run tasks of lm-evaluation-harness on a jaxtune model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError, nearest
from jaxtune.evaluate.systems import System


def open_tasks(names: Sequence[str], include_path: Path | None = None) -> Any:
    """The harness's task manager: over `include_path` alone if given (a scan of its own tasks takes many seconds).

    Raises:
        UserError: lm_eval is not installed, the folder is missing, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'jaxtune[eval]'.") from None
    if not names:
        raise UserError("--tasks: no task is named.")
    if include_path is not None and not include_path.expanduser().is_dir():
        raise UserError(f"--include-path={include_path}: no such folder.")
    given = None if include_path is None else str(include_path.expanduser())
    manager = TaskManager(include_path=given, include_defaults=given is None)
    known = list(manager.all_tasks)
    for name in names:
        if not manager.match_tasks([name]):
            where = f"{include_path} has" if include_path else "lm-evaluation-harness knows"
            listed = f" Known: {', '.join(sorted(known)[:12])}." if len(known) <= 12 else ""
            own = " Tasks of the harness itself are known without --include-path." if include_path else ""
            raise UserError(f"--tasks: {where} no task {name!r}.{nearest(name, known)}{listed}{own}")
    return manager


def run_tasks(
    system: System,
    tokenizer: Any,
    names: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 32,
    eos_ids: Sequence[int] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run tasks: {task: {metric: {"value", "stderr"}}}; a metric under a filter is called "metric,filter"."""
    import lm_eval

    from jaxtune.evaluate.lm import JaxtuneLM

    model = JaxtuneLM(system.module, system.params, tokenizer, batch_size=batch_size, eos_ids=eos_ids)
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {task: _values(values) for task, values in found["results"].items()}


def _values(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    metrics: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        entry = {"value": float(value)}
        metrics[name if filtered == "none" else key] = (
            entry | {"stderr": float(error)} if isinstance(error, int | float) else entry
        )
    return metrics
