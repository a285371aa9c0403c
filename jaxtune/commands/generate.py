"""`jaxtune generate`: continue a prompt or a file of prompts, or chat, with a run, an adapter or a model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtune.errors import UserError, nearest
from jaxtune.flags import OF_ADAPTERS, Flag, parse_options
from jaxtune.reading import parse_json

USAGE = """usage: jaxtune generate TARGET [--prompt=TEXT | --file=FILE] [flags]

Continue texts, or with --chat answer messages. With neither --prompt nor --file, chat on the terminal.
One prompt: its continuation is printed. Several: one JSON object a line, {"prompt": ..., "completion": ...}."""

ARGUMENTS = {"target": Flag("run directory, adapter directory, model directory or hub id", required=True)}
FLAGS = {
    "prompt": Flag("a prompt; give it again for more", list),
    "file": Flag("prompts: FILE.txt, one a line, or FILE.jsonl with a column prompt", Path),
    "out": Flag("write JSON lines to this file, which must not exist, instead of printing", Path),
    "adapter": Flag("PEFT directory to put on TARGET", Path),
    **OF_ADAPTERS,
    "max-new-tokens": Flag("tokens to add at most", int, 128),
    "temperature": Flag("0 takes the most probable token; higher draws more freely", float, 0.0),
    "top-p": Flag("draw from the fewest tokens whose probabilities reach this sum", float, 1.0),
    "top-k": Flag("draw from the k most probable tokens; 0: from all", int, 0),
    "stop": Flag("string or special token that ends a text and is cut off; give it again for more", list),
    "chat": Flag("a prompt is a user's message (or a list of messages); answer it by the chat template", bool, False),
    "seed": Flag("of the draws", int, 0),
    "batch-size": Flag("prompts decoded together", int, 32),
}


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    if options.prompt and options.file:
        raise UserError("--prompt and --file exclude each other.")
    prompts = options.prompt or (read_prompts(options.file, options.chat) if options.file else None)
    if prompts is None and not sys.stdin.isatty():
        raise UserError("give --prompt=TEXT or --file=FILE; without them generate chats, which needs a terminal.")
    if prompts is None and options.out:
        raise UserError("--out has no effect in a chat; give --prompt or --file.")
    if options.out:
        from jaxtune.files import refuse_existing

        refuse_existing(options.out)
    from jaxtune.infer.source import find, load_target

    target = load_target(find(options.target, options.base, adapter=options.adapter, any_base=options.allow_other_base))
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "stop": tuple(options.stop or ()),
        "seed": options.seed,
        "eos_ids": target.eos_ids,
    }
    if prompts is None:
        chat(target, settings)
    else:
        complete(target, prompts, options, settings)


def complete(target: Any, prompts: list, options: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Continue prompts; print the continuations or write them to a file."""
    from jaxtune.infer.generation import generate_text

    model = target.module, target.params, target.tokenizer
    texts = generate_text(*model, prompts, chat=options.chat, batch_size=options.batch_size, **settings)
    lines = [
        json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    if options.out:
        from jaxtune.files import atomic_write_text

        atomic_write_text(options.out, "\n".join(lines) + "\n")
        print(f"written: {options.out} ({len(lines)} prompts)")
    else:
        print(texts[0] if options.prompt and len(texts) == 1 else "\n".join(lines))


def chat(target: Any, settings: dict[str, Any]) -> None:
    """Talk on the terminal: the whole conversation is the prompt of each answer."""
    from jaxtune.infer.generation import generate_text, prepare

    model = target.module, prepare(target.module, target.params), target.tokenizer
    print("An empty line starts a new conversation; Ctrl-D ends.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        try:
            (answer,) = generate_text(*model, [messages], chat=True, on_text=Printer(), **settings)
        except UserError as error:
            print(f"{error}\nA new conversation starts.")
            messages = []
            continue
        print()
        messages.append({"role": "assistant", "content": answer})
        settings = settings | {"seed": settings["seed"] + 1}


class Printer:
    """Prints a text as it grows; an incomplete character is held back until its last byte is there."""

    def __init__(self):
        self.shown = 0

    def __call__(self, index: int, text: str) -> None:
        ready = text.rstrip("�")
        print(ready[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(ready))


def read_prompts(file: Path, chat: bool) -> list[str | list[dict]]:
    """Read the prompts of a .txt or .jsonl file.

    Raises:
        UserError: the file is missing, of another kind, empty or malformed; the line is named.
    """
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--file={file}: expected a .txt file, one prompt a line, or a .jsonl file.")
    if not file.is_file():
        raise UserError(f"--file={file}: no such file.")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    numbered = [(f"{file}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{file} holds no prompt: it is empty.")
    if file.suffix == ".txt":
        return [line for _, line in numbered]
    return [_prompt(where, line, chat) for where, line in numbered]


def _prompt(where: str, line: str, chat: bool) -> str | list[dict]:
    row = parse_json(line, where)
    if not isinstance(row, dict) or "prompt" not in row:
        columns = list(row) if isinstance(row, dict) else []
        found = f"columns {', '.join(columns)}" if columns else type(row).__name__
        raise UserError(f"{where}: expected an object with 'prompt', found {found}.{nearest('prompt', columns)}")
    prompt = row["prompt"]
    if isinstance(prompt, list) and not chat:
        raise UserError(f"{where}: the prompt is a list of messages; give --chat.")
    if not isinstance(prompt, (str, list)):
        raise UserError(f"{where}: the prompt must be a string, found {type(prompt).__name__}.")
    return prompt
