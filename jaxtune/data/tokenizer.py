"""The tokenizer of a directory: loaded, given new tokens, checked to lose no text."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxtune.data.chat import uses_date, with_date
from jaxtune.errors import UserError
from jaxtune.hf.stops import ids_by_file
from jaxtune.reading import parse_json, read_bytes, read_text

# A directory with a tokenizer has at least one of these files.
TOKENIZER_FILES = (
    *(("tokenizer.json",), ("tokenizer_config.json",), ("vocab.txt",), ("vocab.json", "merges.txt")),
    *(("tokenizer.model",), ("spiece.model",), ("sentencepiece.bpe.model",), ("tekken.json",)),
)
# Texts that must survive encoding and decoding: spaces, code, another script, an emoji, mathematics.
ROUND_TRIP = ("How are you doing today?", "def f(n):\n    return n\n", "你好,世界", "so 😀", "∑ x² ≤ ℕ")


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def load_tokenizer(
    path: str, chat_template: str | None = None, date: str | None = None, new_tokens: Sequence[str] = ()
):
    """Load the tokenizer of a directory or hub id.

    Args:
        path: a directory or hub id.
        chat_template: a file whose text replaces the tokenizer's own template.
        date: the date that chat templates write, YYYY-MM-DD; default: today's, taken once.
        new_tokens: names of tokens to add to it.

    Raises:
        UserError: there is no tokenizer; transformers cannot read or convert it, or text does not survive encoding and
            decoding; it is a slow one, which has no character offsets; the template's file is missing; a new token has
            no name, or is one already.
    """
    tokenizer = _plain_tokenizer(path, new_tokens)
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(f"model.chat_template: no such file: {chat_template}")
        tokenizer.chat_template = read_text(chat_template)
    if uses_date(tokenizer.chat_template):
        try:
            day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        except ValueError:
            raise UserError(f"data.date: {date!r} is no date; expected YYYY-MM-DD.") from None
        template = tokenizer.chat_template
        named = {name: with_date(text, day) for name, text in template.items()} if isinstance(template, dict) else None
        tokenizer.chat_template = named or with_date(template, day)
    return tokenizer


@contextlib.contextmanager
def tokenizer_with(path: str, new_tokens: Sequence[str]) -> Iterator[Path]:
    """A directory that holds the tokenizer of another, with tokens added, while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="jaxtune-") as folder:
        _plain_tokenizer(path, new_tokens).save_pretrained(folder)
        yield Path(folder)


@functools.lru_cache
def ids_of_new(path: str, new_tokens: tuple[str, ...]) -> tuple[int, ...]:
    """The ids that new tokens get."""
    return tuple(_plain_tokenizer(path, new_tokens).convert_tokens_to_ids(list(new_tokens)))


def _plain_tokenizer(path: str, new_tokens: Sequence[str] = ()):
    import transformers

    folder = Path(path)
    if folder.is_dir() and not has_tokenizer(folder):
        if found := [*folder.glob("tiktoken.model"), *folder.glob("*.tiktoken")]:
            raise UserError(
                f"{path}: no tokenizer.json here. {found[0].name} is read as tokenizer.model, without special tokens: "
                f"cp {shlex.quote(str(found[0]))} {shlex.quote(str(folder / 'tokenizer.model'))}"
            )
        raise UserError(f"{path}: no tokenizer here (tokenizer.json). Name one with model.tokenizer.")
    _check_ids(folder / "tokenizer.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.is_fast:
            check_round_trip(tokenizer, folder)
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # a panic of the library in Rust is no Exception
        if folder.is_dir():
            ids_by_file(folder)  # of config.json transformers says no more than that a field is wrong
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        first = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise UserError(f"{path}: cannot load a tokenizer: {first}{_conversion(folder)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: {type(tokenizer).__name__} is not a fast tokenizer; a tokenizer.json is needed.")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"{path}: tokenizer_config.json has model_max_length={tokenizer.model_max_length!r}, no number."
        )
    if new_tokens:
        add_tokens(tokenizer, new_tokens, "model.new_tokens")
    return tokenizer


def _check_ids(file: Path) -> None:
    """Refuse a tokenizer.json with an id for whose table, as long as that, tokenizers would look for memory a minute.

    Raises:
        UserError: it has one.
    """
    if not file.is_file() or not re.search(rb"[:\[,]\s*-?\d{9}", text := read_bytes(file)):
        return
    found = parse_json(text, str(file), halves=True)
    found = found if isinstance(found, dict) else {}
    model, added = found.get("model"), found.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = [*vocab.values()] if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if wrong := [i for i in ids if isinstance(i, int) and i >= 10**8]:
        raise UserError(f"{file}: {wrong[0]} is no id of a token.")


def add_tokens(tokenizer: Any, names: Sequence[str], origin: str) -> None:
    """Add tokens to a tokenizer; `origin` names the setting or flag in messages.

    Raises:
        UserError: a name is empty, there twice, or a token already.
    """
    known = tokenizer.get_vocab()
    for name in names:
        if not name.strip() or name in known or list(names).count(name) > 1:
            what = "a token already" if name in known else "empty or given twice"
            raise UserError(f"{origin}: {name!r} is {what}.")
    tokenizer.add_tokens(list(names))


def _conversion(folder: Path) -> str:
    """How to make a tokenizer.json from files of an older format, if there are any."""
    found = [name for names in TOKENIZER_FILES[2:] for name in names if (folder / name).is_file()]
    if not found or (folder / "tokenizer.json").is_file():
        return ""
    code = (
        f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained('OUT')"
    )
    kinds = {"vocab.txt": "bert", "vocab.json": "gpt2", "spiece.model": "t5", "sentencepiece.bpe.model": "xlm-roberta"}
    kind = kinds.get(found[0], "llama")
    why = (
        ""
        if (folder / "config.json").is_file()
        else f' and a config.json such as {{"model_type": "{kind}"}} beside them'
    )
    return (
        f" It has {', '.join(found)} and no tokenizer.json. With the packages that transformers converts them by "
        f'(pip install sentencepiece protobuf tiktoken){why}, this makes one: python -c "{code}"'
    )


def check_round_trip(tokenizer, folder: Path) -> None:
    """Raise UserError for a tokenizer that loses text without marking it as unknown.

    What its tokenizer.json does to a text (lower case, no spaces) is intended; further losses in transformers are not.
    """
    file = folder / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
    for text in ROUND_TRIP:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            continue
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back.strip() == text.strip():
            continue
        covered = {i for start, end in encoding["offset_mapping"] for i in range(start, end)}
        lost = any(i not in covered and not c.isspace() for i, c in enumerate(text))
        if own is not None and not lost:
            kept = own.decode(own.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            lost = kept.strip() == text.strip()
        if lost:
            raise UserError(
                f"{folder}: this tokenizer loses text as transformers {importlib.metadata.version('transformers')} "
                f"reads it: {text!r} comes back as {back!r}. Try another version of transformers, or correct "
                "tokenizer_class in tokenizer_config.json (PreTrainedTokenizerFast takes tokenizer.json as it is)."
            )


def tokenizer_digest(tokenizer) -> str:
    """Return a hex hash of everything in a tokenizer that decides ids: vocabulary, added tokens, chat template."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        json.dumps(tokenizer.chat_template, sort_keys=True),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
