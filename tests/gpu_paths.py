"""Import this first: it lets a check of Saltern, and the commands that it starts, run from a clone on a bare machine.

Two small packages that the machine may lack, webdataset and braceexpand, have stand-ins in helpers/bare.
"""

import importlib.util
import os
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent
STANDING_IN = [name for name in ("webdataset", "braceexpand") if importlib.util.find_spec(name) is None]

_folders = [_TESTS.parent / "src", _TESTS, _TESTS / "helpers", *([_TESTS / "helpers/bare"] if STANDING_IN else [])]
_paths = [str(folder) for folder in _folders]
sys.path[:0] = _paths
os.environ["PYTHONPATH"] = os.pathsep.join([*_paths, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: matrix products repeat to the bit
for _name, _seconds in (("RAY_raylet_start_wait_time_s", "300"), ("RAY_worker_register_timeout_seconds", "300")):
    os.environ.setdefault(_name, _seconds)  # the cores may be busy
