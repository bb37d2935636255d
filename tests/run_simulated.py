"""Run a script of the bundle on the simulated NPU: python tests/run_simulated.py SCRIPT ARGUMENTS."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import npu_simulator

if __name__ == "__main__":
    npu_simulator.install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
