"""What can be refused is refused in the plan: the run's folder stays as it was, and the corrected call works."""

from pathlib import Path

import making
import odd_models
import pytest
import torch
from extracting import extract
from torch import nn

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract import request as requests
from saltern.pipeline.synthesis.attack import AttackRequest, attacking
from saltern.pipeline.synthesis.visualize import VisualizeRequest, visualizing
from saltern.schemas.errors import UserError

NEW = "the folder"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    making.write_shard(tmp_path / "in" / "a.tar", 4)
    return tmp_path / "in"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"model": "odd_models:NoGrad", "layer": "net.body"}, "do not depend on layer 'net.body'"),
        ({"model": "odd_models:Grey", "layer": "net.body"}, "fails on images of 32 x 32"),
        ({"model": "odd_models:Nan", "layer": "net.body"}, "logits that are not finite"),
        ({"model": "odd_models:Nothing"}, "must return logits"),
        ({"layer": "nothing"}, "no layer 'nothing'"),
        ({"layer": "head"}, "which is no grid at 32 x 32 pixels; layers that fit: "),
        ({"crop": 8}, "1 x 1 cell"),
        ({"method": "cam", "layer": "body.0"}, "cam needs a linear head"),
        ({"save_map": False, "map_dtype": "float16"}, "no effect with --no-map"),
        ({"weights": "absent.pth"}, "no weights file"),
        ({"mean": (123.675, 116.28, 103.53)}, "divide values for 0..255 by 255"),
        ({"method": f"{__name__}:Broken", "layer": None}, r"ZeroDivisionError: a slip; .*test_tryout\.py:\d+"),
    ],
)
def test_a_refused_extraction_leaves_a_finished_run_and_a_new_folder_as_they_were(wishes, said, shards, tmp_path):
    done, new = tmp_path / "done", tmp_path / "new"
    assert extract(shards, done, target="top1") == 0
    before = content(done)
    for out, settings in ((done, {"overwrite": True}), (new, {})):
        with pytest.raises(UserError, match=said) as caught:
            extract(shards, out, settings, target="top1", **wishes)
        assert "\n" not in str(caught.value)
    assert content(done) == before
    assert not content(new)
    assert extract(shards, new, target="top1") == 0


class Broken(requests.Method):
    def compute(self, x_BCHW, target_B):
        raise ZeroDivisionError("a slip")


class Detached(odd_models.NoGrad):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize("model", ["odd_models:Grey", f"{__name__}:Detached"])
def test_attack_and_visualize_class_refuse_a_model_before_the_folder_is_touched(model, shards, tmp_path):
    jobs = [
        attacking(AttackRequest([str(shards)], model, "gradient", resize=40, crop=32)),
        visualizing(VisualizeRequest("0", model, crop=32)),
    ]
    for job in jobs:
        with pytest.raises(UserError, match=r"fails on images of 32 x 32|have no gradient"):
            conduct(job, RunOptions(str(tmp_path / "new"), device="cpu", engine="local"))
    assert not content(tmp_path / "new")


def test_a_run_that_is_resumed_is_not_tried_again(shards, tmp_path, monkeypatch):
    assert extract(shards, tmp_path / "run", target="top1") == 0
    monkeypatch.setattr(requests, "try_extract", lambda *_: pytest.fail("tried again"))
    assert extract(shards, tmp_path / "run", target="top1") == 0


def test_an_image_that_does_not_fit_in_memory_is_said(shards, tmp_path, monkeypatch):
    class Large(making.Tiny):
        def forward(self, x_BCHW):
            if x_BCHW.shape[0] == 1:
                torch.empty(2**60)
            return super().forward(x_BCHW)

    monkeypatch.setattr(odd_models, "large", Large, raising=False)
    with pytest.raises(UserError, match="does not fit in this machine's memory"):
        extract(shards, tmp_path / "run", target="top1", model="odd_models:large")


def test_a_training_does_one_step_on_random_images_before_it_begins(tmp_path):
    import casm_toys

    from saltern.pipeline.casm.training.train import train

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = casm_toys.small()

        def forward(self, x):
            return self.net(x).detach() if self.training else self.net(x)

    casm_toys.cut = Cut
    request = casm_toys.request(casm_toys.write_shards(tmp_path / "in", 1), tmp_path / "out", model="casm_toys:cut")
    with pytest.raises(UserError, match="Cut fails on images"):
        train(request, casm_toys.quiet)
    assert not content(tmp_path / "out")
