"""Options of the engine that have no effect, and devices that no job supports, are refused."""

import pytest

from saltern.pipeline.engine.selection import select_engine
from saltern.pipeline.machine import pick_device
from saltern.schemas.errors import UserError


@pytest.mark.parametrize("device", ["gpu", "mps", "CUDA", ""])
def test_an_unknown_device_is_never_another_one(device):
    for call in (lambda: pick_device(device), lambda: select_engine("auto", device, None, None, None)):
        with pytest.raises(UserError, match=r"--device .* is none of auto, cpu, cuda"):
            call()


def test_a_numbered_gpu_names_the_variable():
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1, and give --device cuda"):
        pick_device("cuda:1")


def test_gpus_of_a_worker_need_ray():
    with pytest.raises(UserError, match="--gpus-per-worker has no effect in the local engine"):
        select_engine("local", "cpu", None, None, 0.5)
