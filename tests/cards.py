"""Executes what a result's card and a run's last lines say to load it."""

import contextlib
import io
import re
import textwrap
import warnings

import numpy as np
import zoo

from jaxtune.cli import main


def run(code):
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers tell of new heads
        exec(code, names)
    return names


def trained(argv):
    """Run a command; return the code that it prints to load its result: library -> lines."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(argv) == 0
    printed = re.findall(r"load it with (\w+):\n((?:  .*\n|\n)+)", said.getvalue())
    return {library: textwrap.dedent(code) for library, code in printed}


def card(out):
    """The code of a card: [lines for peft or transformers, lines for jaxtune]."""
    return re.findall(r"```python\n(.*?)\n```", (out / "README.md").read_text(), re.DOTALL)


def theirs_as_ours(code, tokens):
    """Load a result as each piece of code says; assert that all give the same logits. Returns (of peft, of jaxtune)."""
    import torch

    theirs, ours = map(run, code)
    with torch.no_grad():
        expected = theirs["model"].eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    got = ours["module"].apply({"params": ours["params"]}, np.asarray(tokens, np.int32))
    assert zoo.apart(np.asarray(got), expected) < 1e-4
    return theirs, ours
