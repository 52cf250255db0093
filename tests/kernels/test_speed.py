"""What is fast on this processor: flags, and a measurement."""

import os
import subprocess
import sys

import pytest

from qlora_lite.kernels.product import has_onednn
from qlora_lite.kernels.speed import bf16_speedup, has_bf16_units, onednn_speedup

ASK = """
from qlora_lite.kernels.speed import bf16_speedup, has_bf16_units
print(has_bf16_units(), bf16_speedup())
"""


@pytest.mark.skipif(not has_bf16_units(), reason="the processor has no bf16 units")
def test_bf16_is_faster_than_fp32_with_units_for_it():
    assert bf16_speedup() > 1


@pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")
def test_the_speed_of_onednn_is_measured_once():
    assert onednn_speedup() > 0.1
    assert onednn_speedup() == onednn_speedup()


def test_an_older_processor_has_no_bf16_units():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", ASK]
    asked = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert asked.stdout.split() == ["False", "0.0"]
