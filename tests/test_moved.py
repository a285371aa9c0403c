"""Old names of modules."""

import importlib
import importlib.util
import sys

import pytest

import jaxtune
from jaxtune.moved import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_a_module_is_found_under_its_old_name(name):
    assert importlib.util.find_spec(f"jaxtune.{MOVED[name]}") is not None
    sys.modules.pop(f"jaxtune.{name}", None)
    with pytest.warns(DeprecationWarning, match=rf"jaxtune\.{name} is now jaxtune\.{MOVED[name]};"):
        importlib.import_module(f"jaxtune.{name}")


def test_what_it_holds_is_the_same():
    sys.modules.pop("jaxtune.step", None)
    with pytest.warns(DeprecationWarning):
        from jaxtune.step import make_train_step
    assert make_train_step is jaxtune.make_train_step


def test_a_name_that_never_was_is_refused():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("jaxtune.nothing")
