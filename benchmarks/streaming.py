"""`data.streaming` on generated rows: tokenising, the start of a run, tokens a second of batches, memory.

    python benchmarks/streaming.py [--rows=100000] [--work=DIR]
    python benchmarks/streaming.py --rows=10000000 --random    # random tokens in place of a tokenizer's

Rows are prompts and completions of 4 to 12 words of the packaged training set, tokenised by the packaged model's
tokenizer, packed into rows of 512 tokens. Tokenising, a start from the cache, and batches at random places of the epoch
are processes of their own. Resident memory is the most that a process held, and of it what is not mapped from files.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import last_json, machine, run

from jaxtune import tiny

LENGTH, BATCH = 512, 32


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    texts = [json.loads(line)["prompt"] for line in Path(tiny.TRAIN).read_text().splitlines()]
    words = [word for text in texts for word in text.split() if word.isalpha()]
    some = [" ".join(rng.choices(words, k=rng.randint(2, 6))) for _ in range(5000)]
    with path.open("w") as file:
        for i in range(rows):
            file.write(f'{{"prompt": "{rng.choice(some)} {i}?", "completion": "{rng.choice(some)}"}}\n')


def random_tokens(count: int, folder: Path) -> tuple[list, Any]:
    """As `data.prepare`: rows of 8 to 30 random tokens, of which the second half is trained, in the same store."""
    import numpy as np

    from jaxtune.data import Report, Source, SourceReport, cache, tokenize
    from jaxtune.data.blocks import streamed

    def chunks(done: int, notes: Any) -> Iterator[tuple[bytes, bytes, np.ndarray]]:
        for first in range(done, count, 2**12):
            rng, n = np.random.default_rng(first), min(2**12, count - first)
            table = np.zeros(n, tokenize.Encoder.ROW)
            table["length"], table["origin"] = rng.integers(8, 31, n), np.arange(first, first + n)
            table["start"], table["digest"] = table["length"].cumsum() - table["length"], rng.integers(0, 2**63, n)
            nth = np.arange(table["length"].sum()) - table["start"].repeat(table["length"])
            mask = (nth >= table["length"].repeat(table["length"]) // 2).astype(np.uint8)
            yield rng.integers(0, 500, len(nth), np.int32).tobytes(), mask.tobytes(), table

    kinds = tokenize.Encoder.MARK, tokenize.Encoder.ROW
    cache.build_in_parts(folder, kinds, chunks, lambda: {"notes": [], "ends": [], "chat": False, "source": ""})
    blocks, _ = cache.blocks(folder)
    source, told = Source("random", "random:{}", lambda: iter(()), lambda: ""), SourceReport("random", "text")
    rows = streamed(
        folder,
        len(blocks),
        lambda i, verify: tokenize.rows_of(source, tokenize.Encoder, folder, blocks, i, verify),
        told,
        max_length=LENGTH,
        overlength="drop",
        first=1,
        check=lambda rows: None,
    )
    return [rows], Report([told], train_rows=told.kept)


def measure(path: str, steps: int, random_rows: int) -> None:
    """In a process of its own: open the rows and make `steps` batches in order, and some at random places."""
    from jaxtune import data

    began = time.monotonic()
    if random_rows:
        rows, report = random_tokens(random_rows, Path(path))
    else:
        rows, _, report = data.prepare(data.load_tokenizer(str(tiny.BASE)), path, max_length=LENGTH, streaming=True)
    found = {"open, s": time.monotonic() - began, "rows": report.train_rows, "tokens": report.sources[0].tokens}
    if steps:
        began = time.monotonic()
        stream = data.StreamedBatches(rows, batch_size=BATCH, max_length=LENGTH, packing=True)
        found |= {"steps an epoch": stream.steps_per_epoch, "packing, s": time.monotonic() - began}
        began = time.monotonic()
        tokens = sum(int((stream.batch(step)["segments"] > 0).sum()) for step in range(steps))
        found["tokens/s in order"] = tokens / (time.monotonic() - began)
        rng, times = random.Random(1), []
        for _ in range(10):
            began = time.monotonic()
            stream.batch(rng.randrange(round(stream.steps_per_epoch)))
            times.append(time.monotonic() - began)
        found["first batch after a jump, s"] = sorted(times)[5]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found |= {
        name: int(status[key].split()[0]) / 1024 for name, key in (("RSS, MiB", "VmHWM"), ("anonymous", "RssAnon"))
    }
    print(json.dumps(found))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--rows", type=int, default=100_000)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--work", type=Path, help="keeps the rows and the cache")
    p.add_argument("--random", action="store_true", help="random tokens, to measure what comes after the tokenizer")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    p.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.measure:
        return measure(a.measure, a.steps, a.random and a.rows)
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        file = work / (f"{a.rows}" if a.random else f"{a.rows}.jsonl")
        if not a.random and not file.exists():
            work.mkdir(parents=True, exist_ok=True)
            write_rows(file, a.rows)
        cache = {"JAXTUNE_CACHE": str(work / "cache"), "RAYON_NUM_THREADS": str(a.threads)}
        for what, steps in (("tokenise", 0), ("start from the cache", 0), ("batches", 500), ("batches again", 500)):
            command = [sys.executable, __file__, f"--measure={file}", f"--steps={steps}", f"--rows={a.rows}"]
            command += ["--random"] * a.random
            done = run(command, a.threads, **cache)
            found = last_json(done.stdout)
            shown = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
            print(f"{what}: {done.wall:.1f} s, {done.cpu:.1f} processor seconds; {shown}", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
