"""What the benchmarks share: alternating processes, their medians and memory, the machine, a table."""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finished:
    """A process that ended well: wall and processor seconds, peak resident MiB, what it printed."""

    wall: float
    cpu: float
    peak_mib: float
    stdout: str


def run(command: Sequence[str], threads: int, **env: str) -> Finished:
    """Run a command on the first `threads` processors and wait for it.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **env}
    processors = sorted(os.sched_getaffinity(0))[:threads]
    with tempfile.TemporaryFile("w+") as out:
        began = time.monotonic()
        process = subprocess.Popen(
            list(map(str, command)),
            env=variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, processors),
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - began
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nexit {process.returncode}:\n{text[-3000:]}")
    return Finished(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


def alternate(sides: Mapping[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Measure each side in turn, `repeats` times: A B A B. Return {side: {metric: values}}."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for i in range(repeats):
        for name, measure in sides.items():
            values = measure()
            shown = ", ".join(f"{k} {v:,.4g}" for k, v in values.items())
            print(f"[{i + 1}/{repeats}] {name}: {shown}", file=sys.stderr, flush=True)
            for key, value in values.items():
                found[name].setdefault(key, []).append(value)
    return found


def spread(values: Sequence[float]) -> str:
    """The median, and the range where there is one."""
    middle = f"{statistics.median(values):,.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.4g} to {max(values):,.4g})"


def ratio(found: Mapping[str, Mapping[str, Sequence[float]]], metric: str, over: str, under: str) -> float:
    """The ratio of two sides' medians."""
    return statistics.median(found[over][metric]) / statistics.median(found[under][metric])


def report(title: str, found: Mapping, ratios: Mapping[str, tuple[float, str]], file: Path | None = None) -> None:
    """Print a Markdown table of medians and ranges, the ratios with their targets, and the machine."""
    metrics = list(dict.fromkeys(m for side in found.values() for m in side))
    print(f"\n{title}\n\n| | {' | '.join(metrics)} |\n|{'---|' * (len(metrics) + 1)}")
    for name, side in found.items():
        print(f"| {name} | {' | '.join(spread(side[m]) if m in side else '' for m in metrics)} |")
    print()
    for name, (value, target) in ratios.items():
        print(f"{name}: {value:.3f} (target: {target})")
    facts = machine()
    print(
        f"{facts['processor']}, {facts['processors']} processors; "
        + ", ".join(f"{k} {v}" for k, v in versions().items())
    )
    if file is not None:
        values = {name: {"ratio": value, "target": target} for name, (value, target) in ratios.items()}
        record = {"title": title, "measured": found, "ratios": values, "machine": facts, "versions": versions()}
        file.write_text(json.dumps(record, indent=2) + "\n")


def machine() -> dict[str, str | int]:
    """The processor and how many of them this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Python and the libraries that decide a figure."""
    found = {"python": platform.python_version()}
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parser(doc: str, repeats: int = 3) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=repeats, help="times each side is measured")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", type=Path, help="write the figures here too")
    return p


def jaxtune(*arguments: str) -> list[str]:
    """The command line of the tree that this file lies in."""
    return [sys.executable, "-m", "jaxtune", *map(str, arguments)]


def quiet(*words: object) -> None:
    """Run a command of jaxtune in this process, which keeps what it has compiled, without its output.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    from jaxtune import cli

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main(list(map(str, words)))
    if status:
        raise SystemExit(f"{' '.join(map(str, words))}\n{said.getvalue()[-2000:]}")


def tally(found: dict[str, dict[str, list[float]]], name: str, values: Mapping[str, float]) -> None:
    """Add the figures of one run to those of its arm, as `report` takes them, and print them."""
    print(json.dumps({"arm": name, **{key: round(value, 4) for key, value in values.items()}}), flush=True)
    for key, value in values.items():
        found.setdefault(name, {}).setdefault(key, []).append(value)


def read_metrics(workdir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def last_json(text: str) -> dict:
    """The JSON object on the last line that holds one."""
    return json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))


def make_llama(folder: Path, *, dtype: str = "float32", **shape: int) -> None:
    """Save a random Llama of LlamaConfig's fields, with a tokenizer of whole words "w0" to "w{vocab_size - 3}"."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(bos_token_id=None, eos_token_id=1, pad_token_id=None, **shape)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    vocabulary = ["<unk>", "</s>", *_words(config.vocab_size - 2)]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def _words(n: int) -> list[str]:
    return [f"w{i}" for i in range(n)]


def make_rows(file: Path, *, rows: int, length: int, prompt: int, vocab: int = 32000) -> None:
    """Write prompts and completions of `length` tokens together, the end of sequence included."""
    import random

    draw = random.Random(0)
    with file.open("w") as f:
        for _ in range(rows):
            words = draw.choices(_words(vocab - 2), k=length - 1)
            f.write(json.dumps({"prompt": " ".join(words[:prompt]), "completion": " ".join(words[prompt:])}) + "\n")
