"""`jaxtune export`: write a run, an adapter or a model as files that other libraries load."""

from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.flags import OF_ADAPTERS, Flag, parse_options

USAGE = """usage: jaxtune export SOURCE OUT [--merge | --adapter [--bake]] [--dtype=bfloat16] [--scale=0.7]

Write a run, a PEFT adapter or a model as a Hugging Face directory: adapters are merged into their base, or kept as a
PEFT directory with --adapter. An OUT that ends in .gguf becomes one GGUF file, for llama.cpp. OUT must not exist.

--scale=0.7 writes the tuned model at another strength: 0 is the base, 1 the model as it was tuned, and between them
their weights are mixed (WiSE-FT, arXiv:2109.01903), which of LoRA is the adapter's scale; jaxtune eval --frontier
chooses it."""

ARGUMENTS = {
    "source": Flag("run directory, adapter directory, model directory or hub id", required=True),
    "out": Flag("directory, or file that ends in .gguf, to write", Path, required=True),
}
FLAGS = {
    "merge": Flag("merge the adapter into its base (the default)", bool, False),
    "adapter": Flag("write the adapter alone", bool, False),
    "bake": Flag("with --adapter: one rank and scale for all modules, for engines without patterns", bool, False),
    "scale": Flag("the strength of the tuning, 0 or more; default: 1, as it was tuned", float, 1.0),
    "dtype": Flag("of the weights; default: the base's", choices=("float32", "bfloat16", "float16")),
    "new-tokens": Flag("names of tokens, separated by commas, to add to the tokenizer and the embedding"),
    **OF_ADAPTERS,
}


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    if options.merge and options.adapter:
        raise UserError("--merge and --adapter exclude each other.")
    if options.adapter and options.dtype:
        raise UserError("--dtype has no effect with --adapter: adapters are float32, as peft writes them.")
    if options.bake and not options.adapter:
        raise UserError("--bake has no effect without --adapter: a merged model has no scales.")
    if not 0 <= options.scale < float("inf"):
        raise UserError(f"--scale={options.scale:g}: expected 0 (the base) or more; 1 is the model as it was tuned.")
    as_gguf = options.out.suffix == ".gguf"
    if options.new_tokens and (options.adapter or as_gguf):
        raise UserError("--new-tokens writes a whole model directory; leave out --adapter, and .gguf.")
    if as_gguf and options.adapter:
        raise UserError("--adapter writes a PEFT directory; a GGUF file holds the merged model. Leave one out.")
    from jaxtune.files import refuse_existing

    refuse_existing(options.out)
    from jaxtune.hf.digest import recorded
    from jaxtune.hf.export import export_model
    from jaxtune.hf.peft import export_adapter
    from jaxtune.hf.stops import stop_ids
    from jaxtune.infer.source import find, open_source
    from jaxtune.infer.vectors import dense_of, pooled_of
    from jaxtune.models.body import Body

    source = find(options.source, options.base, any_base=options.allow_other_base)
    if source.adapter is None and (options.merge or options.adapter):
        flag = "--merge" if options.merge else "--adapter"
        raise UserError(f"{flag}: {options.source} holds a whole model, not an adapter; leave the flag out.")
    if options.scale == 1:
        module, params, config = open_source(source)
    else:
        module, params, config = at_scale(source, options.scale, options.adapter)
    if source.quantization and not options.adapter:
        import jax

        from jaxtune.hf.load import read_params
        from jaxtune.weights.packed import rounding

        off = rounding(params, read_params(module, source.model, key=jax.random.key(0)))
        print(
            f"The adapter was trained over the base in {source.quantization} and is merged into those weights: they "
            f"differ from the published matrices by {off:.2%} (root mean square)."
        )
    if as_gguf:
        from jaxtune.hf.gguf import export_gguf

        where = {"base": source.model, "tuned_from": source.base, "tokenizer": source.tokenizer}
        where["ends"] = stop_ids(source.adapter) if source.adapter else ()
        for note in export_gguf(module, params, options.out, dtype=options.dtype, **where):
            print(note)
        print(f"written: {options.out}")
        return
    tokenizer = source.tokenizer
    if options.new_tokens:
        tokenizer, module, params = add_tokens(options.new_tokens.split(","), source, module, params)
    shared = {"facts": source.run and read_run_facts(source.run, source.config), "tokenizer": tokenizer}
    if options.scale != 1:
        shared["facts"] = (shared["facts"] or {}) | {"scale": f"{options.scale:g}; figures above are those of 1"}
    shared["ends"] = stop_ids(source.adapter) if source.adapter else ()
    if module.task_type == Body.task_type:
        shared["vectors"], params = pooled_of(source), params | dense_of(source)
    if options.adapter:
        where = {"base": source.base, "base_folder": source.model, "config": config, "bake": options.bake}
        where["record"] = None if source.any_base else source.run or recorded(source.adapter)
        notes = export_adapter(module, params, options.out, **where, **shared)
    else:
        notes = export_model(
            module, params, options.out, base=source.model, tuned_from=source.base, dtype=options.dtype, **shared
        )
    if source.run and options.scale == 1:  # what was measured is the model as it was tuned
        from jaxtune.report.card import carry_evaluation

        carry_evaluation(source.run, options.out)
    for note in notes:
        print(note)
    print(f"written: {options.out}")


def at_scale(source: Any, scale: float, as_adapter: bool) -> tuple[Any, Any, dict[str, Any] | None]:
    """A source at another strength of its tuning: (module, params, adapter config or None), as `open_source`.

    Raises:
        UserError: it has no base, there is nothing between the two, or an adapter cannot hold it.
    """
    from jaxtune.evaluate.systems import pair
    from jaxtune.infer.source import check_continues
    from jaxtune.weights.strength import at_strength, folded, off_the_scale

    check_continues(source)  # a label head has no base
    models = pair(source, "--scale")
    below = off_the_scale(models.base, models.tuned)
    if not as_adapter:
        return models.module, at_strength(models.tuned, below, scale), None
    if below:
        raise UserError(
            f"--scale with --adapter: {source.adapter} trained more than LoRA factors ({next(iter(below))}), whose "
            "strength is a mixture of whole weights; leave out --adapter to write them."
        )
    return models.module, folded(models.tuned, scale), models.config


def add_tokens(names: list[str], source: Any, module: Any, params: Any) -> tuple[Path, Any, Any]:
    """Add tokens to a tokenizer, and rows for them to the model's embedding where it has no unused ones.

    Returns:
        (folder of the tokenizer, which is deleted when the process ends; module; parameters).

    Raises:
        UserError: a name is empty, given twice, or a token already.
    """
    import atexit
    import shutil
    import tempfile

    from jaxtune.data.tokenizer import add_tokens as add_to
    from jaxtune.infer.source import tokenizer_of
    from jaxtune.methods.vocabulary import resize

    tokenizer = tokenizer_of(source)
    add_to(tokenizer, names, "--new-tokens")
    ids = tokenizer.convert_tokens_to_ids(names)
    if max(ids) >= module.spec.vocab:
        module, params = resize(module, params, max(ids) + 1)
    folder = Path(tempfile.mkdtemp(prefix="jaxtune-"))
    atexit.register(shutil.rmtree, folder, True)
    tokenizer.save_pretrained(folder)
    listed = ", ".join(f"{name} ({i})" for name, i in zip(names, ids, strict=True))
    print(
        f"new tokens: {listed}. New rows are the mean of the others; to train them alone set "
        f"--config.tune.lora.trainable_token_indices={','.join(map(str, ids))}."
    )
    return folder, module, params


def read_run_facts(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The facts of a run for the model card, read from its files."""
    from jaxtune.hf.tensors import read_json
    from jaxtune.report.card import run_facts
    from jaxtune.train.log import read_metrics

    metrics = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return run_facts(config, metrics, read_json(run / "summary.json") if (run / "summary.json").is_file() else None)
