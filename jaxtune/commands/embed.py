"""`jaxtune embed`: the vectors of texts, as a file."""

from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.flags import OF_ADAPTERS, Flag, parse_options

USAGE = """usage: jaxtune embed MODEL FILE --out=vectors.npy [--column=text] [--as=document] [--width=128]

Write a vector for each row of a file of texts, in its order: an array f32[N, D] (.npy), or a table of texts and vectors
(.parquet). MODEL is a run, an adapter, a directory of sentence-transformers, or any encoder or decoder.

Started again, the same command goes on where it was stopped."""

ARGUMENTS = {
    "model": Flag("run directory, adapter directory, model directory or hub id", required=True),
    "file": Flag("rows of texts: .jsonl, .csv, .parquet, .txt, or a hub id", required=True),
}
FLAGS = {
    "out": Flag("file to write, .npy or .parquet", Path, required=True),
    "column": Flag("the texts' column; default: text, else the only one of texts"),
    "as": Flag(
        "which of the model's prompts stands before each text, as query or document; default: its default, if any"
    ),
    "prefix": Flag("what stands before each text, instead of a prompt of the model"),
    "width": Flag("the first so many channels (of a Matryoshka model); default: all", int),
    **OF_ADAPTERS,
}
PART = 8192  # texts between two writes


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    kind = options.out.suffix
    if kind not in (".npy", ".parquet"):
        raise UserError(f"--out={options.out}: expected a file that ends in .npy or .parquet.")
    asked = getattr(options, "as")
    if asked is not None and options.prefix is not None:
        raise UserError("--as and --prefix both say what stands before a text; give one.")
    from jaxtune.evaluate.kept import key_of
    from jaxtune.evaluate.systems import identity
    from jaxtune.files import refuse_existing
    from jaxtune.infer.source import find
    from jaxtune.infer.vectors import open_embedder, pooled_of
    from jaxtune.train.runtime import prepare_jax

    refuse_existing(options.out)
    source = find(options.model, options.base, any_base=options.allow_other_base)
    pooled = pooled_of(source)
    prompts = dict(pooled.prompts) if pooled else {}
    if asked is not None and asked not in prompts:
        known = ", ".join(sorted(prompts)) or "none"
        raise UserError(
            f"--as={asked}: the model has no prompt of this name (it has {known}); leave it out, or give --prefix."
        )
    texts = read_texts(options.file, options.column)
    prepare_jax()
    embedder = open_embedder(source)
    most = embedder.pooled.width(embedder.module)
    if options.width is not None and not 1 <= options.width <= most:
        raise UserError(f"--width={options.width}: the model's vectors have {most} channels.")
    named = asked or (pooled and pooled.default)
    prompt = options.prefix if options.prefix is not None else prompts.get(named, "")
    model = key_of(*(identity(folder) for folder in (source.model, source.adapter) if folder))
    write(embedder, texts, prompt, options.width, options.out, model)
    print(f"written: {options.out}")


def read_texts(file: str, column: str | None = None) -> list[str]:
    """The texts of a source of rows.

    Raises:
        UserError: there is no such column, or a row has no text in it.
    """
    from jaxtune import data
    from jaxtune.errors import nearest

    source = data.read(file)
    texts = []
    for number, row in source:
        if column is None:
            found = [name for name, value in row.items() if isinstance(value, str)]
            column = "text" if "text" in row else found[0] if len(found) == 1 else None
            if column is None:
                raise UserError(
                    f"{source.where(number)}: which column holds the texts? Name it with --column. Columns found: "
                    f"{', '.join(row)}."
                )
        if column not in row:
            raise UserError(
                f"{source.where(number)}: no column {column!r}.{nearest(column, row)} Columns found: {', '.join(row)}."
            )
        if not isinstance(row[column], str) or not row[column].strip():
            raise UserError(f"{source.where(number)}: column {column!r} has no text.")
        texts.append(row[column])
    if not texts:
        raise UserError(f"{file}: there are no rows.")
    return texts


def write(embedder: Any, texts: list[str], prompt: str, width: int | None, out: Path, model: str) -> None:
    """Write the vectors of texts in parts, each kept beside `out` until all are there; `model` is a hash of it."""
    import shutil

    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from jaxtune.evaluate.kept import key_of
    from jaxtune.files import atomic_file

    tokens = embedder.tokens(texts, prompt)
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    parts = out.with_name(f"{out.name}.parts-{key_of(model, str(width), *tokens)[:12]}")
    parts.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("vectors", total=len(texts))
        for at in range(0, len(order), PART):
            rows, file = order[at : at + PART], parts / f"{at}.npy"
            if not file.is_file():
                found = embedder.vectors_of([tokens[i] for i in rows], width)
                with atomic_file(file) as temporary, open(temporary, "wb") as stream:
                    np.save(stream, found)
            bar.advance(task, len(rows))
    wide = np.load(parts / "0.npy", mmap_mode="r").shape[1]
    every = np.zeros((len(texts), wide), np.float32)
    for at in range(0, len(order), PART):
        every[order[at : at + PART]] = np.load(parts / f"{at}.npy")
    with atomic_file(out) as temporary:
        if out.suffix == ".npy":
            with open(temporary, "wb") as stream:
                np.save(stream, every)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            vectors = pa.FixedSizeListArray.from_arrays(pa.array(every.reshape(-1)), wide)
            pq.write_table(pa.table({"text": texts, "vector": vectors}), temporary)
    shutil.rmtree(parts)
