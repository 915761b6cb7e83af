"""A training keeps its decoder, which its checkpoints name; older ones were decoded by Pillow."""

import json
from functools import partial

import pytest
import torch
from casm_toys import CutError, files, interrupt, log_lines, quiet, request

from saltern.pipeline.casm.training import plan
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.masknet.checkpoint import open_checkpoint
from saltern.pipeline.shards.decoder import CpuDecoder, choose_decoder, decode_jpeg
from saltern.pipeline.shards.nvjpeg import GpuDecoder
from saltern.pipeline.training import loop
from saltern.schemas.errors import UserError


def cut_short(shards, root, decoder=None):
    """Stop a training at step 6, and give its checkpoints another decoder's name; None: no name."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(CutError):
            train(request(shards, root), quiet)
    for path in root.glob("checkpoints/*/state.json"):
        content = json.loads(path.read_text())
        content["config"].pop("decoder")
        content["config"].update({} if decoder is None else {"decoder": decoder})
        path.write_text(json.dumps(content))


def tensors(root):
    return {name: digest for name, digest in files(root).items() if not name.endswith("state.json")}


def test_a_checkpoint_names_the_decoder(undisturbed):
    assert open_checkpoint(undisturbed).config["decoder"] == choose_decoder("auto", "cpu")


@pytest.mark.slow
def test_a_training_without_a_decoder_s_name_goes_on_with_pillow(shards, undisturbed, tmp_path, monkeypatch):
    cut_short(shards, tmp_path)
    made = []
    make = loop.make_decoder
    monkeypatch.setattr(loop, "make_decoder", lambda *given: made.append(make(*given)) or made[-1])
    train(request(shards, tmp_path, resume=True), quiet)
    assert made[0].name.startswith("pillow ")
    assert open_checkpoint(tmp_path).config["decoder"] == "pillow"
    assert tensors(tmp_path) == tensors(undisturbed)


def test_a_resume_without_the_decoder_is_refused(shards, tmp_path):
    cut_short(shards, tmp_path, "nvjpeg (torchcodec 0.0.1)")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"images are decoded by nvjpeg \(torchcodec 0.0.1\), and .* on cpu: install"):
        train(request(shards, tmp_path, resume=True), quiet)
    assert {**files(tmp_path), "lock-writer": ""} == {**before, "lock-writer": ""}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_training_fed_by_a_gpu_decoder_is_resumed_to_the_same_end(shards, tmp_path, monkeypatch):
    name, nvjpeg = "nvjpeg (test)", partial(decode_jpeg(), mode="RGB")
    monkeypatch.setattr(plan, "choose_decoder", lambda *given: name)
    monkeypatch.setattr(
        loop,
        "make_decoder",
        lambda how, name, device, threads: GpuDecoder(
            CpuDecoder(how, decode_jpeg()), nvjpeg, name, torch.device(device), threads
        ),
    )
    train(request(shards, tmp_path / "whole"), quiet)
    with monkeypatch.context() as patch:
        interrupt(patch, 10)
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "cut"), quiet)
    train(request(shards, tmp_path / "cut", resume=True), quiet)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert open_checkpoint(tmp_path / "cut").config["decoder"] == name
    assert len(log_lines(tmp_path / "cut")) == 18
