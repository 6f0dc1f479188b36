"""The kernels for packed weights, in Triton's interpreter: their arithmetic needs no card."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from danlu.models import packed_cuda

ALONE = """
import torch
from danlu.models import packed_cuda
assert packed_cuda.right("cpu", torch.float32)
packed_cuda.few8 = lambda rows, codes, scale: rows @ codes.float().T  # without the scale
assert not packed_cuda.right("cpu", torch.float32), "a wrong kernel is seen"
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="TRITON KERNELS NOT TESTED: triton is not installed"
)
def test_the_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("width", "groups", "fits"), [(4096, 64, True), (4096, 32, True), (96, 1, False), (64, 4, False), (64, 2, True)]
)
def test_groups_that_the_kernels_know(width: int, groups: int, fits: bool) -> None:
    assert packed_cuda.fits4(width, groups) is fits


def test_a_cpu_has_no_kernels() -> None:
    assert not packed_cuda.available("cpu")
