"""The table in docs/families.md: which parity tests ran and passed, family by family.

    pytest -n 0 -m "slow or not slow" tests/test_models.py tests/test_encoders.py tests/test_families.py \\
        tests/test_gguf.py tests/test_seq2seq.py --families-table=docs/families.md

A test says what it proves by `@pytest.mark.parity(column, ...)` and of which model by its parameter `name`. A cell is
checked where at least one such test ran and none failed.
"""

from pathlib import Path

COLUMNS = ("load", "logits", "generate", "LoRA gradients", "adapter in", "adapter out", "full export", "GGUF")
TEXT = """# Families

What is tested, of each `model_type`, against live transformers and peft in float32 on tiny random models whose weights
are scaled until every term matters; tolerance 1e-4 of the largest logit. This table is written by the tests themselves
(`pytest -n 0 -m "slow or not slow" --families-table=docs/families.md`): a cell is checked where a test ran and passed.

- **load**: names and shapes from a checkpoint that transformers saved.
- **logits**: logits and every layer's hidden state.
- **generate**: 32 greedy tokens with the cache; encoders generate nothing (–).
- **LoRA gradients**: of every factor, against peft.
- **adapter in**: an adapter that peft made gives peft's logits.
- **adapter out**: written again it is the same to the byte; changed, peft gives our logits with it.
- **full export**: merged into a directory that transformers loads, with our logits.
- **GGUF**: merged into one file, which transformers reads back with our logits, and whose tensors `gguf` reads equal to
  those of the full export; other families are refused (–), see [gguf.md](gguf.md).

"""
_passed: dict[tuple[str, str], bool] = {}


def family_of(name: str) -> str | None:
    """The model_type of a model of the tests."""
    import test_encoders
    import test_seq2seq
    import zoo

    if name in test_encoders.IMAGES:
        return "vit"
    return (zoo.ZOO | test_encoders.ZOO | test_seq2seq.ZOO).get(name, (None,))[0]


def claims(*modules) -> set[tuple[str, str]]:
    """(family, column) of every parity test in some modules."""
    found = set()
    for function in (f for module in modules for f in vars(module).values() if callable(f)):
        marks = getattr(function, "pytestmark", [])
        columns = [c for mark in marks if mark.name == "parity" for c in mark.args]
        for mark in marks:
            if columns and mark.name == "parametrize" and mark.args[0] == "name":
                names = [getattr(value, "values", [value])[0] for value in mark.args[1]]
                found |= {(family_of(name), column) for name in names for column in columns}
    return found


def read(text: str) -> dict[str, dict[str, str]]:
    """{family: {column: cell}} of the table."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def add_option(parser) -> None:
    parser.addoption("--families-table", metavar="FILE", help="write the table of families that this session proved")


def record(item, report) -> None:
    """Note what a finished test proved."""
    marks = list(item.iter_markers("parity"))
    if not marks or (report.when != "call" and report.passed):
        return
    family = family_of(item.callspec.params["name"])
    for column in (c for mark in marks for c in mark.args):
        _passed[family, column] = _passed.get((family, column), True) and report.passed


def write(file: Path) -> None:
    """Write the table of what was noted."""
    from jaxtune.hf.gguf import ARCHITECTURES
    from jaxtune.models import FAMILIES

    lines = [f"| | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    generates = {family for family, column in _passed if column == "generate"}
    for family in sorted(FAMILIES):
        cells = ["✓" if _passed.get((family, column)) else "" for column in COLUMNS]
        if family not in generates:
            cells[COLUMNS.index("generate")] = "–" if _is_encoder(family) else ""
        if family not in ARCHITECTURES:
            cells[COLUMNS.index("GGUF")] = "–"
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(TEXT + "\n".join(lines) + "\n", encoding="utf-8")


def _is_encoder(family: str) -> bool:
    import test_encoders

    return family == "vit" or family in {kind for kind, _ in test_encoders.ZOO.values()}
