"""What is ready for a GPU: the benchmark's stages on a CPU, and whole steps compiled for cards that are not there."""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_stage_runs_at_a_small_size():
    import gpu

    a = argparse.Namespace(small=True, steps=1, peer=None)
    found = {name: gpu.stage(name, a) for name in gpu.STAGES}
    for name, cases in found.items():
        if isinstance(gpu.STAGES[name], dict):
            assert all(case["tokens/s"] > 0 for case in cases.values()), name
    assert found["check"]["kernel"] == "as plain arithmetic" and found["decode"]["new tokens/s"] > 0
    assert json.loads(json.dumps(found)) == found


@pytest.mark.deviceless
@pytest.mark.parametrize(
    "card, case",
    [
        ("h100", "1b lora packed by cuDNN, dots"),  # cuDNN by offsets, forward and backward
        ("rtx4090", "1b lora packed, offload"),  # blocks; kept in the host's memory
        ("h100", "1b full packed, dots, 8-bit"),
    ],
)
def test_steps_for_cards_that_are_not_there(card, case):
    try:
        importlib.metadata.version("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the CUDA wheels that compile without a device are not installed (benchmarks/gpu_programs.py)")
    import common

    command = [sys.executable, BENCHMARKS / "gpu_programs.py", f"--cards={card}", f"--case={case}"]
    found = common.last_json(common.run(command, 2, XLA_FLAGS="").stdout)
    assert not found["wrong"]
