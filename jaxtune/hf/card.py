"""The model card, README.md of an exported directory: front matter for the hub, facts of the run, how to load it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.files import atomic_write_text

_IMAGES = "AutoModelForImageClassification"


def is_local(base: str) -> bool:
    """Whether a model is named by a path on this machine rather than by a hub id."""
    return base.startswith(("/", "~", ".")) or base.count("/") != 1


def loading(
    base: str | None,
    here: str,
    *,
    adapter: bool,
    auto: str = "AutoModelForCausalLM",
    config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    rows: int | None = None,
    vectors: bool = False,
) -> dict[str, str]:
    """Code to paste that loads a result: library -> lines.

    Args:
        base: hub id or path of the model that was tuned; None: as adapter_config.json names it.
        here: the directory of the adapter or the model.
        adapter: whether `here` is an adapter rather than a whole model.
        auto: the class of transformers that loads it.
        config: its config.json, for the labels of a label head; nothing else of it is read.
        tokenizer: whether there is one in `here`; of a model of images, what prepares them.
        rows: of the table of tokens, where an adapter was made after some were added to its base.
        vectors: whether it is a directory of sentence-transformers.
    """
    if vectors:
        return {library: code.format(json.dumps(here)) for library, code in _VECTORS.items()}
    where, named = json.dumps(here), json.dumps(base)
    variable, of_inputs = ("processor", "AutoImageProcessor") if auto == _IMAGES else ("tokenizer", "AutoTokenizer")
    classes = f"{auto}, {of_inputs}" if tokenizer else auto
    last = f"\n{variable} = {of_inputs}.from_pretrained({where})" if tokenizer else ""
    own = f"import jaxtune\n\nmodule, params = jaxtune.load({where})"
    if not adapter:
        code = f"from transformers import {classes}\n\nmodel = {auto}.from_pretrained({where}){last}"
        return {"transformers": code, "jaxtune": own}
    imports = "PeftModel" if base else "PeftConfig, PeftModel"
    lines = [f"from peft import {imports}", f"from transformers import {classes}", ""]
    if base is None:
        lines.append(f"config = PeftConfig.from_pretrained({where})")
        named = "config.base_model_name_or_path"
    labels, arguments = _labels(config or {})
    lines += [
        *([f"labels = {labels!r}"] if arguments else []),
        f"base = {auto}.from_pretrained({', '.join([named, *arguments])})",
        *([f"base.resize_token_embeddings({rows})"] if rows else []),
        f"model = PeftModel.from_pretrained(base, {where}){last}",
    ]
    return {"peft": "\n".join(lines), "jaxtune": own}


_VECTORS = {
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer({0})
queries = model.encode_query(["where is my card?"])
documents = model.encode_document(["Cards arrive within a week.", "Our shop opens at nine."])
print(model.similarity(queries, documents))""",
    "jaxtune": """from jaxtune.infer.vectors import open_embedder

model = open_embedder({0})
queries = model(["where is my card?"], model.pooled.prompts.get("query", ""))
documents = model(["Cards arrive within a week."], model.pooled.prompts.get("document", ""))
print(queries @ documents.T)""",
}


def _labels(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names of a label head's labels, and the further arguments for `from_pretrained` of its base, as text."""
    table = config.get("id2label")
    if not table:
        return [], []
    arguments = [
        "num_labels=len(labels)",
        "id2label=dict(enumerate(labels))",
        "label2id={name: i for i, name in enumerate(labels)}",
        "ignore_mismatched_sizes=True",  # the base may have a head for other labels
    ]
    if config.get("problem_type") not in (None, "single_label_classification"):
        arguments.append(f"problem_type={config['problem_type']!r}")
    if config.get("pad_token_id") is not None:
        arguments.append(f"pad_token_id={config['pad_token_id']}")
    return [table[str(i)] for i in range(len(table))], arguments


_ADAPTERS = {
    "lora": "A LoRA adapter",
    "hira": "A HiRA adapter",
    "miss": "A MiSS adapter",
    "ia3": "An (IA)³ adapter",
    "prompt_tuning": "A tuned prompt",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
    "AutoModelForImageClassification": "image-classification",
}


def model_card(
    *,
    name: str,
    base: str,
    adapter: str | None,
    facts: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    auto: str = "AutoModelForCausalLM",
    config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    rows: int | None = None,
    vectors: bool = False,
) -> str:
    """Return the text of README.md. A base on this machine is named by its folder, without the path.

    Args:
        name: of the directory.
        base: hub id or path of the model that was tuned.
        adapter: for a PEFT directory rather than a whole model, its kind, "lora".
        facts: facts on the run for a table, label -> value, in order.
        notes: sentences on what a reader would not expect.
        auto: the class of transformers that loads the model.
        config: as for `loading`.
        tokenizer: as for `loading`.
        rows: as for `loading`.
        vectors: as for `loading`.
    """
    local = is_local(base)
    shown = Path(base).name if local else base
    library = "sentence-transformers" if vectors else "peft" if adapter else "transformers"
    tags = ["jaxtune", *([adapter] if adapter else [])]
    tags += [f"base_model:adapter:{base}"] if adapter and not local else []
    front = [
        *([] if local else [f"base_model: {json.dumps(base)}"]),
        f"library_name: {library}",
        f"pipeline_tag: {'sentence-similarity' if vectors else _PIPELINES[auto]}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    what = f"{_ADAPTERS.get(adapter, 'An adapter')} for" if adapter else "A fine-tuned version of"
    blocks = ["\n".join(["---", *front, "---"]), f"# {name}", f"{what} `{shown}`, made with jaxtune."]
    blocks += notes
    if facts:
        table = [f"| {label} | {cell(value)} |" for label, value in facts.items()]
        blocks.append("\n".join(["## The run", "", "| | |", "|---|---|", *table]))
    kind = {"adapter": bool(adapter), "auto": auto, "config": config, "tokenizer": tokenizer, "rows": rows}
    kind["vectors"] = vectors
    code = loading(None if local else base, name, **kind)
    blocks.append("\n\n".join(["## How to load it", *(f"```python\n{lines}\n```" for lines in code.values())]))
    return "\n\n".join(blocks) + "\n"


_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def put_evaluation(card: Path, block: str) -> None:
    """Put a block of results into a card that `model_card` wrote, before "How to load it", replacing an older one."""
    text = card.read_text(encoding="utf-8")
    head, found, rest = text.partition(_BEGIN)
    if found:
        text = head + rest.partition(_END)[2].lstrip("\n")
    head, heading, rest = text.partition("## How to load it")
    if heading and block:
        atomic_write_text(card, f"{head}{_BEGIN}\n{block}\n{_END}\n\n{heading}{rest}")


def cell(value: Any) -> str:
    """A value as the text of a cell of a Markdown table."""
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return str(value)
