"""README.md and docs/: every code block runs, in the order of its page, as one reader would run it.

Commands run in this process, in a folder of the page's own that looks like a checkout. Those that train get a few steps
by flags appended here; what a page promises of a longer run is tested elsewhere.
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxtune import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)
NEVER = ("pip install",)  # what a shell block may hold that is not run here
SHORT = ("--config.train.steps=2", "--config.train.epochs=none", "--config.train.eval_batches=1")
SMALL = ("--config.train.batch_size=2", "--config.data.max_length=64")
ANSWERS = ("--config.evaluate.rows=2", "--config.evaluate.max_new_tokens=2")
QUICKSTART = "--config=configs/quickstart.py"
TEACHER = "--config.objective.teacher=runs/quickstart"
FEW = {  # what takes the place of a command's flags or is added to them, by what it begins with; the longest counts
    "jaxtune train": SHORT,
    "jaxtune sweep": SHORT,
    f"jaxtune train {QUICKSTART}": (*SHORT, *SMALL, *ANSWERS),
    f"jaxtune sweep {QUICKSTART}": (*SHORT, *SMALL, *ANSWERS),
    f"jaxtune sweep {QUICKSTART} --find-lr": ("--find-steps=2", *SHORT[2:], *SMALL, *ANSWERS),
    "jaxtune train --config=configs/distill.py": (*SHORT, *SMALL),
    f"jaxtune train --config=configs/distill.py {TEACHER} --workdir=runs/on-policy": (
        *(*SHORT, *SMALL, "--config.objective.max_new_tokens=4"),
    ),
    "jaxtune eval": ("--rows=4", "--max-new-tokens=4"),
    "jaxtune eval runs/classifier": ("--rows=16",),
    "jaxtune eval runs/dpo": ("--rows=8",),
    "jaxtune eval runs/vectors": ("--rows=16",),
    "jaxtune eval runs/quickstart --frontier": ("--rows=4",),
    "jaxtune eval runs/quickstart --memory": ("--rows=4",),
    "jaxtune eval runs/quickstart --confidence": ("--rows=4", "--samples=1", "--max-new-tokens=4"),
    "jaxtune data --config=configs/decide_orders.py --known": ("--known-rows=4",),
    "jaxtune eval runs/canaries": ("--rows=4",),
    "jaxtune eval runs/reward": ("--rows=16",),
    "jaxtune generate": ("--max-new-tokens=4",),
    "jaxtune decide": ("--rows=8", "--candidates=prompts"),
}
GENERAL = "jaxtune/assets/tiny/general.jsonl"  # every eighth row of it is enough here
PREPARED = {
    "evaluate": ("runs/quickstart", "runs/a"),
    "verdict": ("runs/quickstart",),
}  # runs that a page takes from the pages before it


def blocks(page):
    """The page's code blocks that run: (language, code, note)."""
    found = [(m["language"], m["code"], m["note"] or "") for m in FENCE.finditer(page.read_text())]
    return [b for b in found if b[0] in ("sh", "python") and not b[2].startswith("not run: ")]


def commands(code):
    """The commands of a shell block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.split(r" && |(?<=\s)#\s.*$", line) if part.strip()]


def few(command):
    """The words of the command, with the flags that make it short."""
    words = [word.replace(GENERAL, "general.jsonl") for word in shlex.split(command)]
    begins = [start for start in FEW if command.startswith(start)]
    if not begins or {"--help", "--dry-run"} & set(words):
        return words
    more = FEW[max(begins, key=len)]
    replaced = {word.partition("=")[0] for word in more}
    return [word for word in words if word.partition("=")[0] not in replaced] + [*more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the first page with the quickstart leaves a copy of its run, for the others."""
    return tmp_path_factory.mktemp("trained") / "run"


def shell(command, trained):
    if command.startswith(NEVER):
        return
    words = few(command)
    assert words[0] == "jaxtune", f"{command}: only jaxtune is run; say why others are not"
    quickstart = re.fullmatch(rf"jaxtune train {QUICKSTART} --workdir=(\S+)", command)
    if quickstart and trained.exists():
        shutil.copytree(trained, quickstart[1])
        return
    assert cli.main(words[1:]) == 0, command
    if quickstart:
        shutil.copytree(quickstart[1], trained)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("jaxtune", "configs", "examples", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    Path("general.jsonl").write_text("".join(Path(GENERAL).read_text().splitlines(keepends=True)[::8]))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("jaxtune.evaluate.memory.SECRETS", 15)  # 16 canaries times 1,023 sentences take a minute
    monkeypatch.setattr("jaxtune.train.cost.POLICIES", ("none", "full"))  # each of them is traced
    return tmp_path


def run(page, trained):
    """Run a page's blocks; return what its Python has named after each of its Python blocks."""
    names: dict = {"__name__": page.stem}
    after = []
    for i, name in enumerate(PREPARED.get(page.stem, ())):
        if i:
            shutil.copytree(PREPARED[page.stem][0], name)
        else:
            shell(f"jaxtune train {QUICKSTART} --workdir={name}", trained)
    for language, code, note in blocks(page):
        if language == "sh":
            for command in commands(code):
                shell(command, trained)
            continue
        exec(compile(code, str(page), "exec"), names)
        after.append(dict(names))
        if note.startswith("file: "):
            Path(note.removeprefix("file: ")).write_text(code)
    return after


def test_what_does_not_run_says_why():
    notes = [
        m["note"] for page in PAGES for m in FENCE.finditer(page.read_text()) if (m["note"] or "").startswith("not")
    ]
    assert all(note.startswith("not run: ") for note in notes) and len(notes) <= 3, notes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_settings_and_flags_that_are_named_exist():
    from jaxtune.config import SECTIONS, SETTINGS

    known = {s.path for s in SETTINGS} | set(SECTIONS) | {"model.apply"}  # the last is a Flax module's
    for page in PAGES:
        if page.stem == "notes":  # which keeps what was tried and taken out
            continue
        for name in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.0-9]+)", page.read_text()):
            assert name.rstrip(".") in known or name.endswith((".py", ".json", ".jsonl", ".md")), (page.name, name)


def test_the_layout_has_a_line_for_each_folder():
    listed = re.findall(r"^  (\w+)/ ", (ROOT / "docs/internals.md").read_text(), re.M)
    folders = [path.name for path in (ROOT / "jaxtune").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(listed) == sorted(folders)


def test_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().split()) < 1050


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p)],
    ids=lambda page: page.stem,
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft of transformers
def test_page_runs(page, checkout, trained, capsys):
    after = run(page, trained)
    if proof := PROOFS.get(page.stem):
        proof(after, checkout, capsys.readouterr().out)


# What a page's own results must show, beside that it ran.


def _readme(after, place, out):
    assert (place / "runs/quickstart/adapter/adapter_config.json").is_file()
    assert (place / "adapter/adapter_model.safetensors").is_file()
    assert float(after[0]["metrics"]["loss"]) < 4.5  # of the base: 5.4


def _api(after, place, out):
    import jax

    loop, sweep, last = after[0], after[1], after[-1]
    assert float(loop["metrics"]["loss"]) < 4.5
    assert jax.tree.structure(last["grads"]) == jax.tree.structure(last["trainable"])
    losses = np.asarray(sweep["metrics"]["loss"])
    assert losses.shape == (4,) and len(set(losses.tolist())) == 4
    # The third member has the rate of the loop above, the same start and the same data.
    np.testing.assert_allclose(losses[2], float(loop["metrics"]["loss"]), rtol=1e-4)
    assert len(last["layouts"]) == 5
    wanted = last["model"].apply(last["jaxtune"].merge(last["lora"]), last["x"])
    np.testing.assert_allclose(last["y"], wanted, atol=1e-6)
    assert re.search(r"^trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}$", out, re.M)


def _classifier(after, place, out):
    assert after[-1]["label"] in {"cancel", "broken", "question", "return", "order", "delay"}


def _adapter(after, place, out):
    assert (place / "merged-chat/model.safetensors").is_file()
    assert "⟦" in out


def _flax(after, place, out):
    assert after[-1]["accuracy"] > 0.8  # 0.33 by chance


PROOFS = {
    "README": _readme,
    "api": _api,
    "first-classifier": _classifier,
    "first-adapter": _adapter,
    "first-flax-model": _flax,
}
