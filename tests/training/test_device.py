"""What is measured of a device."""

import subprocess
import sys

import numpy as np


def test_peak_memory_is_this_processs_and_not_its_parents():
    large = np.ones(2**27)  # 1 GiB that a child begins with as its ru_maxrss
    code = (
        "import torch; from dinoforge.training.device import peak_memory_gib;"
        "print(peak_memory_gib(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert large.nbytes == 2**30
    assert 0 < float(child.stdout) < 0.95
