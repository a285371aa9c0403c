"""Hashes of a base's config, tokenizer and weights, so that a run is resumed over the base it was started with.

A weight file has two: a quick one of its size, its header and blocks spread over it, which is compared before
anything is loaded; and one of the whole file, made while the weights are read.
"""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import xxhash

from jaxtune.errors import UserError
from jaxtune.files import atomic_write_text, hash_of

RECORD = "base.json"  # in the directory of a run
BLOCK, BLOCKS = 2**16, 64  # bytes, of a weight file, spread over it
HEADER = 2**24  # bytes of one that are read at most
TOKENIZER = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_DENSE = "_Dense/"
PASSING = ("transformers_version", "_name_or_path")  # keys of config.json that do not affect the model


class BaseFiles:
    """The files of a base, by their hashes.

    Args:
        folder: the model's directory.
        tokenizer: the tokenizer's directory, where that is another; its files are then called "tokenizer/...".
        weights: whether its weights are read at all.
    """

    def __init__(self, folder: Path, tokenizer: Path | None = None, *, weights: bool = True):
        kinds = ("*.safetensors", "*_Dense/*.safetensors") if weights else ()
        files = [file for kind in kinds for file in sorted(folder.glob(kind))]
        self.folder, self.weights = folder, {str(file.relative_to(folder)): file for file in files}
        listings = sorted(folder.glob("*.safetensors.index.json")) if weights else []
        self.small = {p.name: p for p in [folder / "config.json", *listings] if p.is_file()}
        named = "" if tokenizer in (None, folder) else "tokenizer/"
        for path in sorted((tokenizer or folder).iterdir()):
            if path.name.startswith(TOKENIZER) and path.is_file() and not path.name.endswith(".safetensors"):
                self.small[named + path.name] = path
        self._under_way: Future[dict[str, str]] | None = None

    @cached_property
    def quick(self) -> dict[str, str]:
        """{name: hash}, with quick hashes of weight files."""
        found = {
            name: _of_config(path) if name == "config.json" else hash_of(path) for name, path in self.small.items()
        }
        return found | {name: _sampled(path) for name, path in self.weights.items()}

    def begin(self) -> None:
        """Start on the hashes of whole weight files, in a thread."""
        if self._under_way is None:
            pool = ThreadPoolExecutor(1)
            self._under_way = pool.submit(lambda: {name: hash_of(path) for name, path in self.weights.items()})
            pool.shutdown(wait=False)

    @property
    def whole(self) -> dict[str, str]:
        """{name: hash} of whole weight files; waits for them."""
        self.begin()
        return self._under_way.result()

    def record(self, run: Path) -> None:
        """Record the base of a run, unless a record exists."""
        if not (run / RECORD).exists():
            found = {"path": str(self.folder), "files": self.quick, "whole": self.whole}
            atomic_write_text(run / RECORD, json.dumps(found, indent=1) + "\n")

    def check(self, run: Path, *, whole: bool = False) -> None:
        """Compare with the recorded base of a run, by quick or whole hashes; a run without a record is not compared.

        Raises:
            UserError: it is another base.
        """
        if not (run / RECORD).exists():
            return
        recorded = read_record(run)
        now = self.whole if whole else self.quick
        before = recorded["whole" if whole else "files"]
        if any("tokenizer/" in name for name in now) != any("tokenizer/" in name for name in before):
            now, before = ({k: v for k, v in found.items() if not k.startswith(TOKENIZER)} for found in (now, before))
        if not any(_DENSE in name for name in before):  # recorded before dense layers were read
            now = {name: found for name, found in now.items() if _DENSE not in name}
        unlike = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if unlike:
            name = unlike[0]
            what = "has changed" if name in before and name in now else "is new" if name in now else "is gone"
            more = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
            kind = "adapter" if (run / "adapter_config.json").exists() else "run"
            raise UserError(
                f"{self.small.get(name, self.folder / name)} {what}{more}: the {kind} in {run} started from another "
                f"base (then in {recorded['path']}). Nothing was changed; put that base back, or give another {kind}."
            )

    @contextmanager
    def same(self, run: Path | None) -> Iterator[None]:
        """Load this base within: as that of a run it is compared quickly before, and as a whole after.

        Raises:
            UserError: it is another base than the run's.
        """
        if run is None:
            yield
            return
        self.check(run)
        if (run / RECORD).exists():
            self.begin()
        yield
        self.check(run, whole=True)


def recorded(adapter: Path) -> Path | None:
    """Where the record of an adapter's base is: beside it, or in the run that it lies in; None: there is none."""
    folders = [adapter, *([adapter.parent] if (adapter.parent / "config.json").is_file() else [])]
    return next((folder for folder in folders if (folder / RECORD).is_file()), None)


def carry_record(run: Path, out: Path) -> None:
    """Write what a run, or an adapter, tells of its base into the adapter directory `out`, without this machine's path.

    Raises:
        UserError: it is damaged.
    """
    if (run / RECORD).is_file():
        found = {**read_record(run)}
        found["path"] = Path(found["path"]).name
        atomic_write_text(out / RECORD, json.dumps(found, indent=1) + "\n")


def read_record(run: Path) -> Mapping:
    """The record of a run's base.

    Raises:
        UserError: it is damaged.
    """
    file = run / RECORD
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found["path"], str) and all(isinstance(found[k], dict) for k in ("files", "whole")):
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{file} is damaged. Remove it to resume without comparing the base.")


def _sampled(path: Path) -> str:
    """A hash of a file's size, and of blocks spread over it, its first and last among them."""
    size = path.stat().st_size
    found = xxhash.xxh3_128(str(size).encode())
    last = max(0, size - BLOCK)
    with path.open("rb", buffering=0) as file:
        header = min(int.from_bytes(file.read(8), "little"), size, HEADER)
        found.update(file.read(header))
        for at in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
            found.update(os.pread(file.fileno(), BLOCK, at))
    return found.hexdigest()


def _of_config(path: Path) -> str:
    """A hash of a config's values, whatever its layout."""
    try:
        config = json.loads(path.read_bytes())
        compared = {key: value for key, value in config.items() if key not in PASSING}
    except (ValueError, AttributeError, RecursionError):
        return hash_of(path)
    return xxhash.xxh3_128_hexdigest(json.dumps(compared, sort_keys=True).encode())
