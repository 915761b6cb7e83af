"""A training that is stopped and resumed ends with the same files as an undisturbed one."""

import os
import random
import signal
import time

import casm_toys
import pytest
from casm_toys import CutError, files, interrupt, quiet, request

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.masknet import checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(2,), (4, 17), (random.Random(time.time()).randrange(1, 18),)])
def test_an_interrupted_training_ends_as_an_undisturbed_one(steps, shards, undisturbed, tmp_path):
    for number, step in enumerate(steps):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, step)
            with pytest.raises(CutError):
                train(request(shards, tmp_path / "run", resume=number > 0), quiet)
    said: list[str] = []
    train(request(shards, tmp_path / "run", resume=True), said.append)
    assert files(tmp_path / "run") == files(undisturbed), f"interrupted at {steps}"
    if steps[-1] >= 4:
        assert any(f"resumes at step {steps[-1] // 4 * 4}" in text for text in said)
    train(request(shards, tmp_path / "run", resume=True), quiet)  # nothing is left to do
    assert files(tmp_path / "run") == files(undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_encoder_of_its_own_and_a_pool_in_16_bits_are_gone_on_with_too(shards, tmp_path):
    how = Hyperparameters(
        thinning=casm_toys.OFTEN, lam=2.0, pool_size=3, share_encoder=False, pool_half=True, precision="bf16"
    )
    few = {"classes": [5, 1, 0], "epochs": 2}
    train(request(shards, tmp_path / "whole", hyperparameters=how, **few), quiet)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 7)
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "cut", hyperparameters=how, **few), quiet)
    train(request(shards, tmp_path / "cut", hyperparameters=how, **few, resume=True), quiet)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_that_was_being_written_or_was_damaged_does_not_count(shards, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_clear", lambda self: (_ for _ in ()).throw(CutError))
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "run"), quiet)
    with monkeypatch.context() as patch:
        interrupt(patch, 9)
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "run", resume=True), quiet)
    tensors = tmp_path / "run/checkpoints/8/tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    (tmp_path / "run/checkpoints/.unfinished-12").mkdir()
    (tmp_path / "run/pool/.unfinished-9.safetensors").write_bytes(b"half")
    said: list[str] = []
    train(request(shards, tmp_path / "run", resume=True), said.append)
    assert "damaged" in said[0]
    assert "step 4" in " ".join(said)
    assert files(tmp_path / "run") == files(undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_killed_process_is_gone_on_from(shards, tmp_path, forking):
    process = forking.Process(target=train, args=(request(shards, tmp_path / "killed", epochs=5), quiet))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/checkpoints/12").is_dir() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.Random(time.time()).uniform(0, 0.15))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(request(shards, tmp_path / "killed", epochs=5, resume=True), quiet)
    train(request(shards, tmp_path / "whole", epochs=5), quiet)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


class Scheduler:
    """A scheduler that ends the job by SIGTERM, in place of an exception."""

    def __new__(cls):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("SIGTERM was not answered")


@pytest.mark.parametrize("how", [KeyboardInterrupt, Scheduler], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_names_the_checkpoint(how, shards, tmp_path, monkeypatch):
    interrupt(monkeypatch, 6, how)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(request(shards, tmp_path), said.append)
    assert "the checkpoint of step 4 is complete: the same command with --resume" in said[-1]
