"""The examples learn what they say they do."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_linen_cnn():
    assert load("linen_cnn").main() > 0.95  # 0.25 by chance


def test_nnx_regression():
    base, tuned = load("nnx_regression").main()
    assert base < 0.01 and tuned < 0.01  # the first curve's network is 0.2 off on the second
