"""What is left of a run when something goes wrong: kills, flipped bits, and disks that refuse.

    python benchmarks/faults.py bits --n=200      flipped bits in arrays: each is found, or changes no number
    python benchmarks/faults.py kills --n=40      SIGKILL at any moment: the bytes of a run left alone
    python benchmarks/faults.py processes --n=20  SIGKILL and SIGSTOP to one of two: the other ends; the same bytes
    python benchmarks/faults.py disk              full, read-only, forbidden (as root, on Linux): one sentence each
    python benchmarks/faults.py inputs --n=40     so many mutated files to every reader: read, or refused in one message

Nothing here measures time; it may run beside other work. The exit status is 0 if everything held.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from common import ROOT, jaxtune, machine, versions

STEPS = 30
NOBODY = 65534
RIGHTS = ("dac_override", "dac_read_search", "fowner", "chown")  # of root, by which permissions do not hold for it


def command(folder: Path, workdir: Path, *more: str, name: str = "train") -> list[str]:
    """A LoRA run of a few seconds on the packaged base."""
    settings = {
        "model.path": ROOT / "jaxtune" / "assets" / "tiny" / "base",
        "data.train": folder / "train.jsonl",
        "data.eval": folder / "eval.jsonl",
        "data.max_length": 64,
        "tune.lora.r": 4,
        "tune.lora.lora_dropout": 0.1,
        "optim.lr": 0.01,
        "train.steps": STEPS,
        "train.batch_size": 4,
        "train.eval_every": 10,
        "train.save_every": 3,
        "log.every": 1,
        "log.progress": "false",
    }
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    return jaxtune(name, *words, f"--workdir={workdir}", *more)


def prepare(folder: Path) -> None:
    """Sixty rows of the packaged data, and eight to evaluate on."""
    tiny = ROOT / "jaxtune" / "assets" / "tiny"
    for name, rows in (("train", 60), ("eval", 8)):
        lines = (tiny / f"{name}.jsonl").read_text().splitlines(keepends=True)[:rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def environment(folder: Path, **more: str) -> dict[str, str]:
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAXTUNE_CACHE": str(folder / "cache"),
        **quick,
        **more,
    }


def run(argv: list[str], env: dict[str, str], **options: object) -> tuple[int, str]:
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    return done.returncode, done.stdout


def result(workdir: Path) -> dict[str, object]:
    """The weights of every result, and the metrics without what the clock decides."""
    found: dict[str, object] = {}
    for path in sorted([*workdir.rglob("metrics.jsonl"), *workdir.rglob("*.safetensors")]):
        found[str(path.relative_to(workdir))] = path.read_bytes()
        if path.suffix == ".jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[str(path.relative_to(workdir))] = [
                {k: v for k, v in line.items() if k != "train/tokens_per_second"} for line in lines
            ]
    return found


# ---------------------------------------------------------------------------------------------------------------- kills


def kills(folder: Path, n: int, draw: random.Random) -> list[str]:
    """Kill a run at a random moment, and its successors too, until one ends; compare with one left alone.

    Runs, runs over cached features and sweeps take turns. Each has caches of its own, so that these are killed as well;
    only compiled programs are shared.
    """
    kinds = {
        "lora": command(folder, folder / "WORKDIR"),
        "features": _features(folder, folder / "WORKDIR"),
        "sweep": command(folder, folder / "WORKDIR", "--sweep.optim.lr=0.01,0.02", name="sweep"),
    }
    os.environ |= environment(folder, JAX_COMPILATION_CACHE_DIR=str(folder / "xla"))
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"  # each program is compiled once, and run many times
    alone, seconds = {}, {}
    for kind, argv in kinds.items():
        for name in ("first", "alone"):  # the second with programs in the cache, as all that follow
            began = time.monotonic()
            status, said = _ended(_begin(argv, folder / f"{name}-{kind}"))
            seconds[kind] = time.monotonic() - began
            if status:
                raise SystemExit(said)
        alone[kind] = result(folder / f"alone-{kind}")
        print(f"{kind}: {seconds[kind]:.1f} s alone", flush=True)
    wrong, killed, trials = [], dict.fromkeys(kinds, 0), 0
    while sum(killed.values()) < n:
        kind = list(kinds)[trials % len(kinds)]
        workdir = folder / f"{kind}-{trials}"
        trials += 1
        before, moments = killed[kind], []
        for _ in range(draw.choice((1, 1, 2, 3))):
            process, _ = _begin(kinds[kind], workdir)
            moments.append(draw.uniform(0.02, 1.0) * seconds[kind])
            process.join(moments[-1])
            process.kill()
            process.join()
            killed[kind] += process.exitcode == -signal.SIGKILL
        if killed[kind] == before:
            shutil.rmtree(workdir)
            continue
        status, said = _ended(_begin(kinds[kind], workdir))
        left = [str(p.relative_to(workdir)) for p in workdir.rglob("*") if ".tmp" in p.name or "-tmp" in p.name]
        left += [p.name for p in Path(f"{workdir}.cache").rglob("*.tmp")]
        if status or result(workdir) != alone[kind] or left:
            at = ", ".join(f"{moment:.2f} s" for moment in moments)
            wrong.append(f"{workdir.name}, killed after {at}: exit {status}, left {left}: {said[-1500:]}")
        else:
            shutil.rmtree(workdir)
            shutil.rmtree(f"{workdir}.cache")
        print(f"{sum(killed.values())} kills in {trials} runs, {len(wrong)} wrong", flush=True)
    counts = ", ".join(f"{count} of {kind}" for kind, count in killed.items())
    print(f"kills: {sum(killed.values())} ({counts}); {trials - len(wrong)} of {trials} runs ended as one left alone")
    return wrong


def _begin(argv: list[str], workdir: Path) -> tuple[multiprocessing.Process, Path]:
    """The command in a process of its own, and the file of what it prints; forked from one with all imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])  # of tests/, which is on its path
    words = [word.replace("WORKDIR", workdir.name) for word in argv[3:]]  # without python -m jaxtune
    out = workdir.with_suffix(".said")
    process = context.Process(target=_main, args=(words, str(out), f"{workdir}.cache"))
    process.start()
    return process, out


def _main(words: list[str], out: str, cache: str) -> None:
    os.environ["JAXTUNE_CACHE"] = cache
    with open(out, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from jaxtune.cli import main

    sys.exit(main(words))


def _ended(begun: tuple[multiprocessing.Process, Path]) -> tuple[int, str]:
    process, out = begun
    process.join()
    return process.exitcode, out.read_text()


def processes(folder: Path, n: int, draw: random.Random) -> list[str]:
    """Kill one of two processes that share a run at a random moment, or stop it for good, until the run is over.

    The other one has to end by itself: how and after how long is printed. The result is compared with that of two that
    were left alone.
    """
    os.environ |= environment(folder, JAX_COMPILATION_CACHE_DIR=str(folder / "xla"))
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    argv, stuck = command(folder, folder / "WORKDIR"), 60

    def pair(workdir: Path, stuck: int = stuck) -> list[multiprocessing.Process]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            own = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num-processes=2", f"--stuck-after={stuck}"]
        return [_begin([*argv, *own, f"--process-id={i}"], workdir)[0] for i in range(2)]

    def ended(started: list[multiprocessing.Process]) -> list[int]:
        for process in started:
            process.join()
        return [process.exitcode for process in started]

    for name in ("first", "alone"):
        began = time.monotonic()
        # The first compiles, which may take long; the others find its programs in the cache.
        if any(statuses := ended(pair(folder / name, 900 if name == "first" else stuck))):
            raise SystemExit(f"{statuses}: {(folder / name).with_suffix('.said').read_text()}")
        seconds = time.monotonic() - began
    print(f"{seconds:.1f} s alone", flush=True)
    wrong, killed, trials, ends, longest = [], 0, 0, Counter(), Counter()
    while killed < n:
        workdir, trials = folder / f"pair-{trials}", trials + 1
        for _ in range(draw.choice((1, 2, 3))):
            started, who = pair(workdir), draw.randrange(2)
            how = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
            started[who].join(draw.uniform(0.1, 1.0) * seconds)
            if started[who].exitcode is not None:
                ended(started)
                continue
            os.kill(started[who].pid, how)
            began, killed = time.monotonic(), killed + 1
            started[1 - who].join(2 * stuck + 60)
            key = how.name, ("first", "second")[who], started[1 - who].exitcode
            ends[key] += 1
            longest[key] = max(longest[key], round(time.monotonic() - began))
            for process in started:
                process.kill()
            ended(started)
        statuses = ended(pair(workdir))
        left = [str(p.relative_to(workdir)) for p in workdir.rglob("*") if ".tmp" in p.name or "-tmp" in p.name]
        if any(statuses) or result(workdir) != result(folder / "alone") or left:
            wrong.append(f"{workdir}: {statuses}, {left}: {workdir.with_suffix('.said').read_text()[-1500:]}")
        print(f"{killed} kills in {trials} runs, {len(wrong)} wrong", flush=True)
    for (how, who, status), count in sorted(ends.items(), key=str):
        print(f"{how} to the {who}: the other ended with {status}, {count} times, after at most "
              f"{longest[how, who, status]} s")  # fmt: skip
    wrong += [f"{key}: the other did not end by itself with status 1" for key in ends if key[2] not in (0, 1, -6)]
    return wrong


# ----------------------------------------------------------------------------------------------------------------- bits


def bits(folder: Path, n: int, draw: random.Random) -> list[str]:
    """Flip one bit at a time in what holds arrays: checkpoints, token and feature caches, and a base."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxtune.train.checkpoint import Checkpoints
    from jaxtune.train.optim import optimizer
    from jaxtune.train.step import init_state

    def state(seed: int):
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = {"small": ((5,), jnp.float32), "a": ((300, 40), jnp.float32), "b": ((64, 128), jnp.bfloat16)}
        weights = {k: jax.random.normal(key, *shape) for key, (k, shape) in zip(keys, shapes.items(), strict=True)}
        return init_state(weights, {}, optimizer("adamw", lr=0.1), jax.random.key(seed))

    def same(x, y):
        return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x.trainable), jax.tree.leaves(y.trainable)))

    said: list[str] = []
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, say=said.append)
    for step in (3, 6):
        checkpoints.save(step, state(step), {"runs": [{"best": None}]})
    checkpoints.wait()
    kept, whole = checkpoints.folder / "6", folder / "whole"
    shutil.copytree(kept, whole)
    files = [p for p in whole.rglob("*") if p.is_file() and "state" in p.parts and p.parent.name == "d"]
    sizes = [p.stat().st_size for p in files]
    found, harmless, wrong = 0, 0, []
    while found + len(wrong) < n:
        [file] = draw.choices(files, sizes)
        at, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        _flip(kept / file.relative_to(whole), at, bit)
        got, _ = checkpoints.restore(lambda _: state(0))
        if same(got, state(3)):
            found += 1
        elif same(got, state(6)):
            harmless += 1  # a copy that orbax keeps and nobody reads
        else:
            wrong.append(f"{file.relative_to(whole)} byte {at} bit {bit}: other numbers came back")
        shutil.rmtree(checkpoints.folder / "damaged-6", ignore_errors=True)
        shutil.copytree(whole, kept, dirs_exist_ok=True)
        checkpoints.manager.reload()
    checkpoints.close()
    print(
        f"checkpoints: {found} of {found + len(wrong)} flipped bits that change a number were found "
        f"({harmless} more changed none)"
    )
    return wrong + _bits_of_caches(folder, n, draw) + _bits_of_a_base(folder, n, draw)


def _bits_of_caches(folder: Path, n: int, draw: random.Random) -> list[str]:
    import numpy as np

    from jaxtune.data import cache
    from jaxtune.train import features

    def tokens(a, b):
        a.write(np.arange(5000, dtype="<i4").tobytes())
        b.write(bytes(5000))
        return np.zeros(10, "i4")

    def fill(file, first, done):
        file.write(np.arange(40_000, dtype=np.float32).tobytes())

    wrong = []
    cache.build(folder / "tokens", tokens, dict)
    layout = features.FileLayout.of(np.full(100, 10), 40, np.float32, True)
    store = features.Store(features.GIB, folder / "features")
    store.open("k", layout, fill)
    for name, place, damaged in (
        ("token cache", folder / "tokens", lambda: cache.damage(folder / "tokens") is not None),
        (
            "feature cache",
            store.path("k"),
            lambda: features._verified.clear() or not features._is_whole(store.path("k")),
        ),
    ):
        files, found = sorted(place.iterdir()), 0
        for _ in range(n):
            file = draw.choice(files)
            at, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
            _flip(file, at, bit)
            found += bool(damaged())
            _flip(file, at, bit)
        assert not damaged()
        print(f"{name}: {found} of {n} flipped bits were found")
        wrong += [f"{name}: {n - found} bits were not found"] * (found < n)
    return wrong


def _bits_of_a_base(folder: Path, n: int, draw: random.Random) -> list[str]:
    from jaxtune.errors import UserError
    from jaxtune.hf.digest import BaseFiles

    base = shutil.copytree(ROOT / "jaxtune" / "assets" / "tiny" / "base", folder / "base")
    (folder / "run").mkdir()
    BaseFiles(base).record(folder / "run")
    files = [p for p in base.iterdir() if p.suffix == ".safetensors" or p.name == "tokenizer.json"]
    found = 0
    for _ in range(n):
        file = draw.choice(files)
        at, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        _flip(file, at, bit)
        try:
            BaseFiles(base).check(folder / "run")
            BaseFiles(base).check(folder / "run", whole=True)
        except UserError as error:
            found += file.name in str(error)
        _flip(file, at, bit)
    print(f"base: {found} of {n} flipped bits were found, and the file named")
    return [f"base: {n - found} bits were not found"] * (found < n)


def _flip(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0] ^ (1 << bit)
        f.seek(at)
        f.write(bytes([byte]))


# ----------------------------------------------------------------------------------------------------------------- disk


@contextlib.contextmanager
def mounted(where: Path, mib: float) -> Iterator[Path]:
    """A file system of its own, of so many MiB."""
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(mib * 2**20)}", "none", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def read_only(where: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", where], check=True)


def disk(folder: Path, only: str | None) -> list[str]:
    """Every command on a disk that is full, read-only or somebody else's: one sentence, status 2, or 1 in a run."""
    env, done = environment(folder), folder / "done"
    status, said = run(command(folder, done), env)
    if status:
        raise SystemExit(said)
    wrong, count = [], 0

    def case(
        name: str, argv: list[str], expected: set[int], *words: str, whole: Path | None = None, **options: object
    ) -> None:
        nonlocal count
        if only and not any(word in name for word in only.split(",")):
            return
        status, said = run(argv, {**env, **options.pop("env", {})}, **options)
        last = [line for line in said.splitlines() if line.startswith("jaxtune: ")]
        clear = "Traceback" not in said and "Exception ignored" not in said
        held = status in expected and clear and (status == 0 or len(last) == 1) and all(w in said for w in words)
        held = held and "not enough memory" not in said
        if whole and (left := [str(p) for p in whole.rglob("*.tmp")]):
            held, said = False, f"{said}\nleft: {left}"
        count += 1
        told = (last or said.splitlines()[-1:] or [""])[-1][:200]
        print(f"{'ok   ' if held else 'WRONG'} {name}: exit {status}: {told}", flush=True)
        if not held:
            wrong.append(f"{name}: exit {status}\n{said[-3000:]}")
            print(said[-3000:], flush=True)

    for mib in (0.0, 0.05, 1.0):
        with mounted(folder / "full", 20) as place:
            (place / "ballast").write_bytes(bytes(int((20 - mib) * 2**20)))
            name = f"train with {mib} MiB left"
            case(name, command(folder, place / "run"), {2})
    for at in ("run/config.json", "tensorboard/*", "checkpoints/3", "checkpoints/6*", "checkpoints/15"):
        with mounted(folder / "full", 60) as place:
            argv = _filling(command(folder, place / "run"), place, at)
            case(f"train whose disk fills up at {at}", argv, {1}, "No room", "checkpoint")
    full = ("--config.tune.method=full",)
    swept = "--sweep.optim.lr=0.01,0.02"
    for at, name, flags, words in (
        (".adapter.*", "train", (), (f"of step {STEPS}", "resumes")),
        (".model.*", "train", full, (f"of step {STEPS}", "resumes")),
        (".adapter.*/README.md", "train", (), (f"of step {STEPS}", "resumes")),
        ("run/.summary.json.*", "train", (), (f"of step {STEPS}", "resumes")),
        ("run/.report.html.*", "train", (), (f"of step {STEPS}", "resumes")),
        ("checkpoints/6*", "sweep", (swept,), ("finished is kept", "resumes")),
        (".adapter.*", "sweep", (swept,), ("finished is kept", "resumes")),
        ("run/.sweep.csv.*", "sweep", (swept,), ("finished is kept", "resumes")),
        ("run/.report.html.*", "sweep", (swept,), ("finished is kept", "resumes")),
    ):
        with mounted(folder / "full", 120) as place:
            argv = command(folder, place / "run", *flags, name=name)
            argv = [word for word in argv if flags != full or "tune.lora" not in word]
            case(f"{name} whose disk fills up at {at}", _filling(argv, place, at), {1}, "No room", *words, whole=place)
            (place / "ballast").unlink(missing_ok=True)
            case(f"{name} again, after {at}", argv, {0}, "result: " if name == "train" else "report: ", whole=place)
    for at in ("eval/kept.jsonl", "run/.eval.json.*", "run/.report.html.*"):
        with mounted(folder / "full", 60) as place:
            shutil.copytree(done, place / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
            argv = jaxtune("eval", place / "run", "--rows=2")
            words = ("No room", "measured is kept", "resumes")
            case(f"eval whose disk fills up at {at}", _filling(argv, place, at), {1}, *words, whole=place)
            (place / "ballast").unlink(missing_ok=True)
            case(f"eval again, after {at}", argv, {0}, "written: ", whole=place)
    for at, name, argv in (
        (".out.*", "export", lambda place: jaxtune("export", done, place / "out")),
        (".out.*", "export --adapter", lambda place: jaxtune("export", done, place / "out", "--adapter")),
        (".r.html.*", "report", lambda place: jaxtune("report", done, f"--out={place / 'r.html'}")),
        ("*a.jsonl*", "generate --out", lambda place: _generate(done, place)),
        ("*c.py*", "init", lambda place: _init(folder, place)),
    ):
        with mounted(folder / "full", 60) as place:
            shutil.copytree(done, place / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
            before = set(place.rglob("*"))
            argv = _filling(argv(place), place, at)
            case(f"{name} whose disk fills up at {at}", argv, {2}, "No room", whole=place)
            if new := {p for p in place.rglob("*") if p.name not in ("ballast", ".lock")} - before:
                wrong.append(f"{name}: left {sorted(new)}")
    with mounted(folder / "ro", 30) as place:
        shutil.copytree(done, place / "run")
        (place / "empty").mkdir()
        read_only(place)
        case("train, read-only", command(folder, place / "new"), {2}, "Read-only")
        case("train goes on, read-only", command(folder, place / "run"), {2}, "Read-only")
        case(
            "sweep, read-only",
            command(folder, place / "s", "--sweep.optim.lr=0.01,0.02", name="sweep"),
            {2},
            "Read-only",
        )
        case("export, read-only", jaxtune("export", done, place / "out"), {2}, "Read-only")
        case("eval, read-only", jaxtune("eval", place / "run", "--rows=2"), {2}, "Read-only")
        case("report, read-only", jaxtune("report", place / "run"), {2}, "Read-only")
        case("generate to a file, read-only", _generate(done, place), {2}, "Read-only")
        case("init, read-only", _init(folder, place), {2}, "Read-only")
        case(
            "generate from a read-only run", jaxtune("generate", place / "run", "--prompt=a", "--max-new-tokens=2"), {0}
        )
        case("cache, read-only", command(folder, folder / "ro-cache"), {0}, env={"JAXTUNE_CACHE": str(place)})
        case(
            "feature cache, read-only",
            _features(folder, folder / "ro-features"),
            {0},
            env={"JAXTUNE_CACHE": str(place)},
        )
    with mounted(folder / "full", 1) as place:
        (place / "ballast").write_bytes(bytes(2**20 - 2**15))
        case("export, full", jaxtune("export", done, place / "out"), {2}, "No room")
        case("report, full", jaxtune("report", done, f"--out={place / 'r.html'}"), {0, 2})
        case("cache, full", command(folder, folder / "f-cache"), {0, 2}, env={"JAXTUNE_CACHE": str(place)})
        case("feature cache, full", _features(folder, folder / "f-features"), {0, 2}, env={"JAXTUNE_CACHE": str(place)})
        case("standard output, full", ["bash", "-c", f"{sys.executable} -m jaxtune train --help > /dev/full"], {1, 2})
    _forbidden(folder, done, case)
    print(f"disk: {count - len(wrong)} of {count} cases ended in one sentence")
    return wrong


# -------------------------------------------------------------------------------------------------------------- inputs


def inputs(folder: Path, n: int, draw: random.Random) -> list[str]:
    """What `tests/test_bad_input.py` mutates and reads, counted."""
    os.environ |= environment(folder)
    sys.path.insert(0, str(ROOT / "tests"))
    from test_bad_input import READERS, read_mutated

    wrong, read, refused = [], 0, 0
    for reader in READERS:
        before = read, refused, len(wrong)
        for _ in range(n):
            seed = draw.randrange(2**32)
            try:
                said = read_mutated(reader, seed, folder / "mutated")
            except (Exception, SystemExit) as error:
                wrong.append(f"{reader}, seed {seed}: {type(error).__name__}: {str(error)[:300]}")
            else:
                read, refused = read + (said is None), refused + (said is not None)
        print(f"{reader}: {read - before[0]} read, {refused - before[1]} refused, {len(wrong) - before[2]} wrong")
    print(f"inputs: {read + refused} of {read + refused + len(wrong)} clear, {refused} of them refused")
    return wrong


def _generate(done: Path, place: Path) -> list[str]:
    (place.parent / "prompts.txt").write_text("a\n")
    flags = (f"--file={place.parent / 'prompts.txt'}", f"--out={place / 'a.jsonl'}", "--max-new-tokens=2")
    return jaxtune("generate", done, *flags)


def _init(folder: Path, place: Path) -> list[str]:
    base = ROOT / "jaxtune" / "assets" / "tiny" / "base"
    return jaxtune("init", f"--model={base}", f"--data={folder / 'train.jsonl'}", f"--out={place / 'c.py'}")


def _features(folder: Path, workdir: Path) -> list[str]:
    argv = [word for word in command(folder, workdir) if "tune.lora" not in word]
    return [*argv, "--config.tune.method=head", "--config.train.steps=60"]


def _filling(argv: list[str], place: Path, at: str) -> list[str]:
    """The command, on a disk that is full from the moment at which a path of this pattern is made or renamed to."""
    script = f"""
import fnmatch, os, sys
zeros, full = bytes(2**16), False
def fill(event, args):
    global full
    names = args[:2] if event == "os.rename" else args[:1] if event in ("open", "os.mkdir") else ()
    if full or not any(fnmatch.fnmatch(os.fsdecode(n), {f"*/{at}"!r}) for n in names if isinstance(n, (str, bytes))):
        return
    full = True
    fd = os.open({str(place / "ballast")!r}, os.O_WRONLY | os.O_CREAT)
    for block in (zeros, zeros[:4096], zeros[:1]):
        try:
            while True: os.write(fd, block)
        except OSError:
            pass
    os.close(fd)
sys.addaudithook(fill)
from jaxtune.cli import run
run()
"""
    return [sys.executable, "-c", script, *map(str, argv[3:])]


def _forbidden(folder: Path, done: Path, case: Callable[..., None]) -> None:
    """Among folders of another user, without root's right to pass over permissions; and as a user without a home."""
    shut = folder / "shut"
    shutil.copytree(done, shut / "run")
    _give_away(shut)
    another = ["setpriv", f"--bounding-set={','.join('-' + name for name in RIGHTS)}"]
    case("train, forbidden", [*another, *command(folder, shut / "new")], {2}, "Permission denied")
    case("train goes on, forbidden", [*another, *command(folder, shut / "run")], {2}, "Permission denied")
    case("export, forbidden", [*another, *jaxtune("export", done, shut / "out")], {2}, "Permission denied")
    case("eval, forbidden", [*another, *jaxtune("eval", shut / "run", "--rows=2")], {2}, "Permission denied")
    case("report, forbidden", [*another, *jaxtune("report", shut / "run")], {2}, "Permission denied")
    case("generate to a file, forbidden", [*another, *_generate(done, shut)], {2}, "Permission denied")
    prompt = ("--prompt=a", "--max-new-tokens=2")
    case("generate among the forbidden", [*another, *jaxtune("generate", shut / "run", *prompt)], {0})
    for path in (shut / "run" / "adapter", shut / "run"):
        path.chmod(0o700)
        closed = [*another, *jaxtune("generate", shut / "run", *prompt)]
        case(f"generate, {path.name} of another user closed", closed, {2}, "Permission denied")
    closed = [*another, *command(folder, shut / "run")]
    case("train goes on, run of another user closed", closed, {2}, "Permission denied")
    case("export, run of another user closed", [*another, *jaxtune("export", shut / "run", folder / "o")], {2})
    for path in (shut / "run" / "adapter", shut / "run"):
        path.chmod(0o755)
    run(_features(folder, folder / "fill"), environment(folder))
    _give_away(folder / "cache")
    case("cache of another user", [*another, *command(folder, folder / "a")], {0})
    case("features of another user", [*another, *_features(folder, folder / "b")], {0}, "are found")
    for path in (folder / "cache").glob("*/*"):
        if path.is_dir():
            path.chmod(0o700)
    case("closed sets of another user", [*another, *command(folder, folder / "c")], {0}, "belongs to another user")
    case("closed features of another user", [*another, *_features(folder, folder / "d")], {0}, "cannot be read")
    for path in (folder / "cache").iterdir():
        path.chmod(0o700)
    case("closed cache of another user", [*another, *command(folder, folder / "e")], {0}, "belongs to another user")
    home = folder / "nobody"  # a user with no entry in passwd and no home, who may read what the interpreter is made of
    home.mkdir()
    os.chown(home, 54321, 54321)
    read = "+dac_read_search"
    nobody = [
        "setpriv",
        "--reuid=54321",
        "--regid=54321",
        "--clear-groups",
        f"--inh-caps={read}",
        f"--ambient-caps={read}",
    ]
    unset = ("HOME", "JAXTUNE_CACHE", "JAX_COMPILATION_CACHE_DIR", "USER", "LOGNAME", "USERNAME")
    nobody += ["env", *(word for name in unset for word in ("-u", name))]
    case("no home, no such user: train", [*nobody, *command(folder, home / "run")], {0}, "result: ", cwd=home)
    case("no home: features", [*nobody, *_features(folder, home / "head")], {0}, "features: ready", cwd=home)
    case("no home: data", [*nobody, *command(folder, home / "d", name="data")], {0}, "written: ", cwd=home)
    case("no home: generate", [*nobody, *jaxtune("generate", home / "run", *prompt)], {0}, cwd=home)
    case("no home: export", [*nobody, *jaxtune("export", home / "run", home / "out")], {0}, "written: ", cwd=home)
    case("generate from another user's run", [*nobody, *jaxtune("generate", shut / "run", *prompt)], {0}, cwd=home)
    case("train into root's folder", [*nobody, *command(folder, folder / "g")], {2}, "Permission denied", cwd=home)


def _give_away(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("kills", "processes", "bits", "disk", "inputs"))
    p.add_argument("--n", type=int, default=40, help="kills, bits of each kind, or files of each")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", help="of the cases of disk: those whose name holds one of these words")
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name).resolve(), random.Random(options.seed)
        prepare(folder)
        if options.what == "disk":
            wrong = disk(folder, options.only)
        else:
            wrong = {"kills": kills, "processes": processes, "bits": bits, "inputs": inputs}[options.what](
                folder, options.n, draw
            )
    print(f"{machine()['processor']}; {', '.join(f'{k} {v}' for k, v in versions().items())}")
    for text in wrong:
        print(f"\n{text}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
