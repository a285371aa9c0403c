"""`jaxtune init`: look at a data file and a model, and write a config file for them."""

import json
import math
import shlex
from pathlib import Path

from jaxtune.cli import Flag, parse_options
from jaxtune.config import Columns
from jaxtune.errors import UserError

USAGE = """usage: jaxtune init --model=DIR_OR_ID --data=FILE [--out=config.py]

Look at a data file, find how its rows are read, and write a commented config file for `jaxtune train`."""

FLAGS = {
    "model": Flag("Hugging Face directory or hub id", required=True),
    "data": Flag("training data: a file, a saved data set or a hub id", required=True),
    "out": Flag("the file to write; never one that exists", Path, Path("config.py")),
    "tokenizer": Flag("directory or hub id of the tokenizer; default: the model's"),
    "columns": Flag("which columns to use: prompt=THEIRS,completion=THEIRS; default: by their names", Columns),
}

WHOLE = 2**31 - 1  # a length that no row exceeds


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, usage=USAGE)
    from jaxtune import propose
    from jaxtune.data import Batches, load_tokenizer, prepare
    from jaxtune.files import atomic_write_text, refuse_existing

    out, name = options.out, options.data
    if out.suffix != ".py":
        raise UserError(f"--out={out}: a config is a Python file; give a name that ends in .py.")
    refuse_existing(out)
    config, parameters = read_model(options.model)
    layout = propose.recognise(propose.open_source(name), options.columns)
    tokenizer = load_tokenizer(tokenizer_path(options.model, options.tokenizer))
    model = describe(options.model, options.tokenizer, config, parameters, bool(tokenizer.chat_template))

    settings = {**layout.settings, "vocab_size": config.get("vocab_size")}
    (whole,), _, _ = prepare(tokenizer, [name], max_length=WHOLE, **settings)
    proposal = propose.propose(name, layout, whole.length, model)
    length, packing = proposal["data.max_length"], proposal.get("data.packing", False)
    train, held_out, report = prepare(
        tokenizer,
        [name],
        eval=proposal.get("data.eval"),
        eval_fraction=proposal.get("data.eval_fraction", 0.0),
        max_length=length,
        overlength=proposal.get("data.overlength", "drop"),
        **settings,
    )
    findings = [*report.lines(), *proposal.notes]
    if held_out and (common := shared_rows(held_out, train[0])):
        findings.append(f"{common:,} of the {len(held_out):,} evaluation rows are also among the training rows")
    batches = Batches(train, batch_size=proposal["train.batch_size"], max_length=length, packing=packing)
    epochs, rows = proposal["train.epochs"], f"{batches.batch_size} {'packed sequences' if packing else 'rows'}"
    findings.append(f"{batches.steps(epochs):,} steps of {rows} in {epochs} epoch{'s' if epochs > 1 else ''}")

    workdir = Path("runs") / (out.stem if out.stem != "config" else Path(name).stem)
    command = f"jaxtune train --config={shlex.quote(str(out))} --workdir={shlex.quote(str(workdir))}"
    title = f"Tune {Path(options.model).name} on {Path(name).name} ({layout})."
    text = propose.write_config(proposal, title, command, findings)
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_existing(out)
    atomic_write_text(out, text)
    last = f"Wrote {out}. Look at it, then run\n\n    {command}"
    show(train[0], tokenizer, [f"{Path(name).name}: {layout}", *findings], last)


def read_model(path: str) -> tuple[dict, int | None]:
    """Return the config.json of a directory or hub id, and the number of parameters where the weights lie here.

    Raises UserError if there is no such model, it has no weights, or it is no causal language model.
    """
    folder = Path(path).expanduser()
    parameters = None
    if folder.is_dir():
        from jaxtune.hf.tensors import index_dir

        file = folder / "config.json"
        if not file.is_file():
            raise UserError(f"{path} is no model directory: it has no config.json.")
        parameters = sum(math.prod(entry.shape) for entry in index_dir(folder).values())
    else:
        file = _fetch_config(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}.") from None
    classes = config.get("architectures") or []
    if classes and not any(c.endswith(("ForCausalLM", "LMHeadModel")) for c in classes):
        raise UserError(f"{path} is a {classes[0]}; jaxtune tunes causal language models (...ForCausalLM).")
    return config, parameters


def _fetch_config(path: str) -> Path:
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or Path(path).exists():
        raise UserError(f"--model={path}: no such directory (looked in {Path.cwd()}).")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json"))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model={path}: no directory here, and as a hub id it cannot be fetched: {first}") from None


def tokenizer_path(model: str, tokenizer: str | None) -> str:
    """Return where the tokenizer is, or raise UserError for a model directory without one."""
    folder = Path(model).expanduser()
    if tokenizer is None and folder.is_dir():
        if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
            raise UserError(
                f"{model}: no tokenizer here (tokenizer.json). Add it, or name one with --tokenizer=DIR_OR_ID."
            )
        return str(folder)
    return tokenizer or model


def describe(path: str, tokenizer: str | None, config: dict, parameters: int | None, has_template: bool):
    """Return the `propose.Model` of a config.json.

    Raises UserError if it says neither how wide the model is nor how many positions it knows.
    """
    from jaxtune.propose import Model

    def number(*names: str) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return config[name]
        raise UserError(f"{path}: config.json has no {' or '.join(names)}; is this a language model?")

    positions = number("max_position_embeddings", "n_positions", "n_ctx")
    return Model(path, tokenizer, positions, number("hidden_size", "n_embd"), parameters, has_template)


def shared_rows(evaluation, train) -> int:
    """Count the evaluation rows whose content is also that of a training row."""
    import numpy as np

    return int(np.isin(evaluation.digest, train.digest).sum())


def show(rows, tokenizer, findings: list[str], last: str) -> None:
    """Print what was found and two rows: on a terminal the trained tokens are green, elsewhere between ⟦ and ⟧."""
    from rich.console import Console

    from jaxtune.data import render_plain, render_rows

    console = Console(soft_wrap=True, markup=False, highlight=False)
    for line in findings:
        console.print(line)
    console.print()
    console.print(render_rows(rows, tokenizer) if console.is_terminal else render_plain(rows, tokenizer))
    console.print(last)
