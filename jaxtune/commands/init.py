"""`jaxtune init`: look at a data file and a model, and write a config file for them."""

import re
import shlex
from pathlib import Path

from jaxtune.config import Columns, read_value
from jaxtune.errors import UserError, printable
from jaxtune.flags import Flag, parse_options
from jaxtune.reading import read_json

USAGE = """usage: jaxtune init --model=DIR_OR_ID --data=FILE [--out=config.py] [--config.section.key=value ...]

Look at a data file, find how its rows are read, and write a commented config file for `jaxtune train`. Settings that
are given (see jaxtune train --help) stand in the config, and rows are looked at as they say."""

FLAGS = {
    "model": Flag("Hugging Face directory or hub id", Path, required=True),
    "data": Flag("training data: a file, a saved data set or a hub id", Path, required=True),
    "out": Flag("the file to write; never one that exists", Path, Path("config.py")),
    "tokenizer": Flag("directory or hub id of the tokenizer; default: the model's", Path),
    "columns": Flag("which columns to use: prompt=THEIRS,completion=THEIRS; default: by their names", Columns),
}

OF_FLAGS = {"model.path": "model", "model.tokenizer": "tokenizer", "data.train": "data", "data.columns": "columns"}


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, usage=USAGE, settings=True)
    given = {path: read_value(path, text, f"--config.{path}={text}") for path, text in options.settings.items()}
    if clash := next((path for path in given if path in OF_FLAGS), None):
        raise UserError(f"--config.{clash}: here it is --{OF_FLAGS[clash]}={options.settings[clash]}.")
    from jaxtune import models
    from jaxtune.data import load_tokenizer, prepare
    from jaxtune.data.labels import JOINED
    from jaxtune.files import atomic_write_text, refuse_existing
    from jaxtune.models.classifier import read_labels
    from jaxtune.models.spec import Config, DecoderSpec
    from jaxtune.run import propose
    from jaxtune.run.recognise import WHOLE, fitted, open_source, reading, recognise, recognise_targets

    out, name = options.out, str(options.data)
    if out.suffix != ".py":
        raise UserError(f"--out={out}: a config is a Python file; give a name that ends in .py.")
    refuse_existing(out)
    config, shapes, narrowest = read_model(options.model)
    spec = models.family(config).spec(Config(config))
    source = open_source(name)
    writes_targets = getattr(spec, "encoder", None) is not None
    layout = (recognise_targets if writes_targets else recognise)(source, options.columns, reading(given))
    if layout.is_text and not writes_targets:
        check_generates(options.model, config, spec)
    elif layout.labels is not None:
        layout = fitted(layout, source, read_labels(config))
        layout.labels.joined = JOINED if isinstance(spec, DecoderSpec) else None
    tokenizer = load_tokenizer(
        tokenizer_path(options.model, options.tokenizer), given.get("model.chat_template"), given.get("data.date")
    )
    model = propose.ModelFacts(
        path=str(options.model),
        tokenizer=options.tokenizer and str(options.tokenizer),
        positions=spec.positions,
        width=spec.width,
        shapes=shapes,
        has_template=bool(tokenizer.chat_template),
        narrowest=narrowest,
    )
    settings = {**layout.settings, "vocab_size": spec.vocab}
    form = layout.labels or layout.form
    settings |= {"allow_left_out": given.get("data.allow_left_out") or ()} if form is None else {}
    (whole,), _, _ = prepare(tokenizer, [name], max_length=WHOLE, **settings)
    lengths = whole.longest
    if form is not None:
        lengths = form.lengths(whole)  # before it has limits of its own
        form.seen(whole)
    proposal = propose.propose(name, layout, lengths, model).changed(options.settings)
    if form is not None:
        form.cut_to(proposal["data.max_length"])
    train, held_out, report = prepare(
        tokenizer,
        [name],
        eval=proposal.get("data.eval"),
        eval_fraction=proposal.get("data.eval_fraction", 0.0),
        max_length=proposal["data.max_length"],
        overlength=proposal.get("data.overlength", "drop"),
        **settings,
    )
    noticed = () if layout.labels is None else layout.labels.notes
    findings = [*report.lines(), *proposal.notes, *noticed, *leaked(held_out, train[0]), steps(proposal, train)]

    workdir = Path("runs") / (out.stem if out.stem != "config" else options.data.stem)
    command = f"jaxtune train --config={shlex.quote(str(out))} --workdir={shlex.quote(str(workdir))}"
    title = f"Tune {options.model.name} on {options.data.name} ({layout})."
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_existing(out)
    atomic_write_text(out, propose.write_config(proposal, title, command, findings))
    last = f"Wrote {out}. Look at it, then run\n\n    {command}"
    show(train[0], tokenizer, form, [f"{options.data.name}: {layout}", *findings], last)


def read_model(path: Path) -> tuple[dict, tuple[tuple[int, ...], ...] | None, int]:
    """Return the config.json of a directory or hub id, the shapes of its tensors if they are local, and the smallest
    side of a matrix in its layers.

    Raises:
        UserError: there is no such model, or it has no weights.
    """
    from jaxtune.run.propose import RANK

    shapes, narrowest = None, RANK
    if path.is_dir():
        from jaxtune.hf.tensors import index_dir

        file = path / "config.json"
        if not file.is_file():
            raise UserError(f"{path} is no model directory: it has no config.json.")
        index = index_dir(path)
        shapes = tuple(entry.shape for entry in index.values())
        # Embeddings and heads get no adapters: BERT has 2 token types and one row of position_ids.
        sides = (min(e.shape) for name, e in index.items() if len(e.shape) == 2 and re.search(r"\.\d+\.", name))
        narrowest = min(sides, default=RANK)
    else:
        file = _fetch_config(path)
    return read_json(file), shapes, narrowest


def check_generates(path: Path, config: dict, spec) -> None:
    """Raise UserError unless the model continues text."""
    from jaxtune.models.spec import DecoderSpec

    classes = config.get("architectures") or []
    named = not classes or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
    if not named or not isinstance(spec, DecoderSpec):
        raise UserError(
            f"{path} is a {(classes or [config['model_type']])[0]}, which predicts labels (columns text and label, or "
            "tokens and labels), but these rows are text to continue: give a ...ForCausalLM model, or name the columns "
            "with --columns=text=THEIRS,label=THEIRS."
        )


def _fetch_config(path: Path) -> Path:
    hub_id = str(path)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/")) or path.exists():
        raise UserError(f"--model={path}: no such directory (looked in {Path.cwd()}).")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model={path}: no directory here, and as a hub id it cannot be fetched: {first}") from None


def tokenizer_path(model: Path, tokenizer: Path | None) -> str:
    """Return where the tokenizer is, or raise UserError for a model directory without one."""
    from jaxtune.data.tokenizer import has_tokenizer

    if tokenizer is None and model.is_dir() and not has_tokenizer(model):
        raise UserError(f"{model}: no tokenizer here (tokenizer.json). Add it, or name one with --tokenizer=DIR_OR_ID.")
    return str(tokenizer or model)


def leaked(held_out, train) -> list[str]:
    """A line on how many evaluation rows have the content of a training row; none if there are no such rows."""
    import numpy as np

    common = 0 if held_out is None else int(np.isin(held_out.digest, train.digest).sum())
    return [f"{common:,} of the {len(held_out):,} evaluation rows are also among the training rows"] if common else []


def steps(proposal, train) -> str:
    """The length of the proposed run, in words."""
    from jaxtune.data import Batches

    size, length = proposal.get("train.batch_size", 8), proposal["data.max_length"]
    rows = "packed sequences" if (packing := proposal.get("data.packing", False)) else "rows"
    if count := proposal.get("train.steps"):
        return f"{count:,} steps of {size} {rows}"
    epochs = proposal.get("train.epochs", 1)
    if not packing:  # then lengths do not change the count, and a row of several texts is longer than each of them
        length = max(length, *(int(rows.length.max(initial=0)) for rows in train))
    count = Batches(train, batch_size=size, max_length=length, packing=packing).steps(epochs)
    return f"{count:,} steps of {size} {rows} in {epochs:g} epoch{'s' if epochs > 1 else ''}"


def show(rows, tokenizer, form, findings: list[str], last: str) -> None:
    """Print the findings and two rows; trained tokens are green on a terminal and between ⟦ and ⟧ elsewhere."""
    from rich.console import Console

    from jaxtune.data import render_plain, render_rows

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    for line in findings:
        console.print(printable(line))
    console.print()
    if form is not None:
        console.print(printable(form.render(rows, tokenizer)))
    else:
        console.print(render_rows(rows, tokenizer) if console.is_terminal else render_plain(rows, tokenizer))
    console.print(last)
