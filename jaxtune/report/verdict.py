"""What came of a run in three sentences: what got better, what got worse, what to do; or what is not measured yet."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.evaluate.known import memory_from
from jaxtune.files import atomic_write_text, updating
from jaxtune.objectives.task import TASKS
from jaxtune.report import evaluation
from jaxtune.report.run import RunRecord
from jaxtune.report.sentences import measured

TOLD = 3  # metrics in a sentence
FIRST = ("loss", "json_exact", "accuracy", "entity_f1", "numeric", "exact_match", "rouge_l", "token_f1")


class Verdict(NamedTuple):
    """Three sentences on a run."""

    better: str
    worse: str
    advice: str


def verdict(run: RunRecord) -> Verdict:
    """What got better, what got worse, what to do."""
    if run.settings["model.init"] == "random":
        return Verdict(*_alone(run))
    gained, told = _gained(run)
    lost, worse = _lost(run)
    return Verdict(told, worse, _advice(run, gained, lost))


def keep_verdict(folder: Path) -> None:
    """Write the verdict of a run into its summary.json, if it has one."""
    from jaxtune.report.run import read_run

    file = folder / "summary.json"
    if not file.is_file():
        return
    with updating(folder):
        run = read_run(folder)
        found = run.summary | {"verdict": verdict(run)._asdict()}
        if found != run.summary:
            atomic_write_text(file, json.dumps(found, indent=2) + "\n")


def _alone(run: RunRecord) -> Iterator[str]:
    """Of a run that began on random weights, which has no base."""
    yield "The run began on random weights: there is no base that it could be better than."
    yield "Nor is there anything that it could have lost."
    yield "Judge it by its held-out loss and its answers."


def _gained(run: RunRecord) -> tuple[bool | None, str]:
    """(whether the task got better, None where no test says it; a sentence)."""
    entries = measured(run)
    tested = {name: e for name, e in entries.items() if "verdict" in e and name != "general_loss"}
    if tested:
        better = [
            name
            for name in (*FIRST, *tested)
            if name != "perplexity" and name in tested and tested[name]["verdict"] == "better"
        ]
        shown = [_change(tested[name]) for name in dict.fromkeys(better)][:TOLD]
        where = f" on {next(iter(tested.values()))['rows']:,} held-out rows"
        if shown:
            return True, f"Better than the base: {', '.join(shown)}{where}."
        return False, f"Better than the base: nothing{where}, as far as the tests can tell."
    loss = entries.get("loss", {})
    if {"base", "tuned"} <= loss.keys():
        fell = loss["tuned"]["value"] < loss["base"]["value"]
        command = _command(run)
        said = f"{'It learned' if fell else 'It did not learn'}: {_change(loss)}"
        return None if fell else False, f"{said}; {command} says how sure that is."
    return (
        None,
        f"What got better is not measured: there was no held-out data; {_command(run, '--data=FILE')} measures it.",
    )


def _lost(run: RunRecord) -> tuple[bool | None, str]:
    """(whether something got worse, None where it is not known; a sentence)."""
    held_out, told, missing = run.evaluation.get("held_out", {}).get("metrics", {}), [], []
    told += [f"{_change(e)} on held-out rows" for e in held_out.values() if e.get("verdict") == "worse"][:TOLD]
    told += list(_wider(run.evaluation.get("held_out", {})))
    sure = run.evaluation.get("confidence", {}).get("metrics", {})
    told += [
        _change(entry) for name, entry in sure.items() if name == "wrong_and_sure" and entry.get("verdict") == "worse"
    ]
    forgetting, memory = run.evaluation.get("forgetting"), run.evaluation.get("memory")
    if forgetting:
        told += list(_forgotten(forgetting))
    elif _continues(run):
        missing.append(f"what it cost outside the task is not measured ({_command(run, '--forgetting=FILE')} does)")
    seen = memory_from(run.metrics)
    if memory and memory["memorised"] == "yes":
        told.append(f"the {memory['why'].removeprefix('The ').rstrip('.')}")
    elif not memory and (seen["verbatim"], seen["auc"]) != (None, None):
        told.append(_watched(seen))
    elif not memory and _watches(run):
        pass  # and saw nothing
    elif not memory and _continues(run):
        missing.append(f"nor is what it memorised ({_command(run, '--memory')})" if missing else
                       f"what it memorised is not measured ({_command(run, '--memory')} does)")  # fmt: skip
    parts = [f"Worse than the base: {'; '.join(told)}"] if told else []
    if not held_out and not _continues(run):
        missing.append(f"what got worse is not measured ({_command(run)} does)")
    if not told and not missing:
        where = f" on {forgetting['rows']:,} rows outside the task" if forgetting else ""
        parts = [f"Worse than the base: nothing{where}, as far as the tests can tell"]
    text = "; ".join([*parts, *missing])
    return (True if told else None if missing else False), f"{text[:1].upper()}{text[1:]}."


def _watched(seen: Mapping[str, int | None]) -> str:
    """What the evaluations of a run said of its memory."""
    if seen["verbatim"] is not None:
        return f"the model memorised from step {seen['verbatim']:,} on: training rows go on word for word"
    return f"the model fits training rows closer than held-out ones from step {seen['auc']:,} on"


def _watches(run: RunRecord) -> bool:
    """Whether its evaluations looked for memory."""
    return any("eval/memory/auc" in line for line in run.metrics)


def _wider(part: Mapping[str, Any]) -> Iterator[str]:
    """The gap between groups that grew most certainly, if one did."""
    groups = part.get("groups", {})
    for name, entry in groups.get("gaps", {}).items():
        better = part["metrics"][name]["better"] > 0
        if better and entry.get("difference", {}).get("low", 0) > 0:
            lowest = f"{groups['column']} {entry['tuned']['lowest']}"
            yield f"the gap of {part['metrics'][name]['label']} between groups grew ({lowest} is the lowest)"
            return


def _forgotten(part: Mapping[str, Any]) -> Iterator[str]:
    """What text outside the task says got worse."""
    whole = part["metrics"].get("loss", {})
    domains = part.get("groups", {}).get("metrics", {}).get("loss", {})
    worse = {name: entry for name, entry in domains.items() if entry.get("verdict") == "worse"}
    if whole.get("verdict") == "worse":
        yield _change(whole)
    if worse:  # also where another domain gained as much
        most = max(worse, key=lambda name: worse[name]["difference"]["value"])
        change = _change(worse[most]).removeprefix(worse[most]["label"]).strip()
        yield f"most of all {most} ({change})" if whole.get("verdict") == "worse" else f"loss on {most} ({change})"
    for entry in part.get("flips", {}).values():
        if entry["verdict"] == "worse":
            yield f"{entry['lost']:,} answers turned from right to wrong and {entry['gained']:,} back"
            break


def _advice(run: RunRecord, gained: bool | None, lost: bool | None) -> str:
    frontier, memory = run.evaluation.get("frontier"), run.evaluation.get("memory")
    folder = shlex.quote(str(run.folder))
    if gained is False:
        return "Keep the base: look at the data (jaxtune data), the learning rate, or train longer."
    if memory["memorised"] == "yes" if memory else memory_from(run.metrics)["verbatim"] is not None:
        return (
            "Do not publish it where its data is private: take repeated rows out (jaxtune data --write-clean), and "
            "train for fewer passes or with a lower rate."
        )
    forgetting = run.evaluation.get("forgetting")
    forgot = forgetting is not None and any(_forgotten(forgetting))
    if forgot and frontier and frontier["chosen"] is not None and frontier["chosen"] != 1:
        return (
            f"Use it at scale {frontier['chosen']:g}, which keeps most of the gain and forgets less: "
            f"jaxtune export {folder} OUT --scale={frontier['chosen']:g}."
        )
    if forgot and not frontier:
        return (
            f"If that text matters, look for a scale that forgets less ({_command(run, '--frontier=FILE')}), or train "
            "again with general text among data.train."
        )
    if forgot:
        return "If that text matters, train again with general text among data.train, a lower rate or fewer layers."
    if lost:
        return "Look at the rows that got worse (eval/rows.jsonl) before you use it."
    if gained is None or lost is None:
        return "Measure what is missing before you use it."
    return "Use it."


def _change(entry: Mapping[str, Any]) -> str:
    """ "held-out loss 5.38 to 0.28", a share in percent."""
    shown = [evaluation.value(entry, who).partition(" [")[0] for who in ("base", "tuned")]
    return f"{entry['label']} {shown[0]} to {shown[1]}"


def _command(run: RunRecord, *flags: str) -> str:
    return " ".join(["jaxtune eval", shlex.quote(str(run.folder)), *flags])


def _continues(run: RunRecord) -> bool:
    """Whether the result continues text, of which alone there is general text and a memory."""
    name = run.settings["objective.name"]
    auto = run.summary.get("auto_class") or (TASKS[name].auto_class if name in TASKS else "")
    return bool(run.summary.get("continues", auto == "AutoModelForCausalLM"))
