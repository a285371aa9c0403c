"""Old names of modules that moved into folders: `from jaxtune.step import make_train_step` works, and warns."""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "adapters": "methods.adapters",
    "checkpoint": "train.checkpoint",
    "features": "train.features",
    "foreign": "weights.foreign",
    "generation": "infer.generation",
    "log": "train.log",
    "loop": "train.loop",
    "optim": "train.optim",
    "parallel": "train.parallel",
    "places": "methods.places",
    "plan": "train.cost",
    "propose": "run.propose",
    "quantized": "weights.packed",
    "rewrite": "weights.rewrite",
    "schema": "config.schema",
    "step": "train.step",
    "sweep": "train.stacked",
    "target": "infer.source",
    "vocabulary": "methods.vocabulary",
    "watch": "train.watch",
}


class Moved:
    """Finds a module by its old name: one that looks up its names in the new place.

    A finder and loader without their base classes: importlib.abc takes longer to import than the rest of the package.
    """

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "jaxtune" and name in MOVED else None

    def create_module(self, spec):
        new = f"jaxtune.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}; its old name will go.", DeprecationWarning, stacklevel=2)
        module = ModuleType(spec.name, f"{new} under its old name.")
        module.__getattr__ = lambda name: getattr(importlib.import_module(new), name)
        return module

    def exec_module(self, module):
        """Nothing is run: the module is that of the new place."""


sys.meta_path.append(Moved())
