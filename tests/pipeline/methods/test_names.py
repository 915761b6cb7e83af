"""Names and options: what is accepted, and the messages about wrong ones."""

import sys
from pathlib import Path

import pytest
import torch

from saltern.pipeline.methods import build, find
from saltern.schemas.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gradcam", {}, "did you mean 'grad-cam'"),
        ("zzz", {}, "known: ablation-cam, attention, cam"),
        ("grad-cam", {"layer": "stage3"}, "did you mean 'stage"),
        ("grad-cam", {"layer": "backbone"}, "its layers: stem, stage1, stage2, unused, fc"),
        ("grad-cam", {"layer": ["stage1", "stage1"]}, "given twice"),
        ("cam", {"layer": ["stage1", "stage2"]}, "takes one layer, not 2"),
        ("cam", {"layer": "stage1"}, "use grad-cam"),
        ("gradient", {"layer": "stage1"}, "no target layer"),
        ("gradient", {"reduse": "max"}, "did you mean 'reduce'"),
        ("gradient", {"reduce": "mean"}, "one of max, sum, l2"),
        ("grad-cam", {"reduce": "max"}, "unknown key 'reduce'"),
        ("cam", {"checkpoint": "x"}, "cam: no checkpoint is taken; --checkpoint is of casm and localizer"),
        ("cam", {"reduce": "max"}, "unknown key 'reduce' in the options of cam: it has none"),
        ("captum:Salience", {}, "did you mean 'Saliency'"),
        ("captum:Saliency", {"absolute": True}, "unknown key 'absolute'"),
        ("captum:Occlusion", {}, "needs the option 'sliding_window_shapes'"),
        ("no_such_module:Method", {}, "cannot import 'no_such_module'"),
        ("collections:OrderedDic", {}, "did you mean 'OrderedDict'"),
        ("collections:OrderedDict", {}, "no subclass of saltern.pipeline.methods.Method"),
    ],
)
def test_wrong_names_are_answered_with_the_right_ones(name, options, said, tiny):
    with pytest.raises(UserError) as caught:
        build(name, tiny, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "target", "said"),
    [
        ("stage2", torch.tensor([0, 5]), "classes 0..4"),
        ("stage2", torch.tensor([-1, 0]), "classes 0..4"),
        ("stage2", torch.tensor([0, 1, 2]), "one a sample (2)"),
        ("stage2", torch.tensor([0.0, 1.0]), "int64"),
        ("unused", None, "does not run"),
        ("fc", None, "no grid"),
    ],
)
def test_wrong_calls_say_what_is_wrong(layer, target, said, tiny, images):
    with build("grad-cam", tiny, layer=layer) as method, pytest.raises(UserError) as caught:
        method(images(2, 16), target)
    assert said in str(caught.value)


def test_options_of_all_types_come_from_text(tmp_path: Path, monkeypatch, tiny, images):
    (tmp_path / "own_means.py").write_text(
        "from typing import ClassVar, Literal\n"
        "import torch\n"
        "from saltern.pipeline.methods import Method\n"
        "class Mean(Method):\n"
        '    """Mean over the channels; class-agnostic."""\n'
        "    needs_target = False\n"
        "    ours: ClassVar[int] = 3\n"
        "    _inner: int = 3\n"
        "    steps: int = 2\n"
        "    scale: float = 1.0\n"
        "    name_of: str = 'a'\n"
        "    sizes: list[int] | None = None\n"
        "    both: bool = False\n"
        "    def compute(self, x_BCHW, target_B):\n"
        "        return self.scale * x_BCHW.mean(1), self.model(x_BCHW), None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = "own_means:Mean"
    full = {"steps": 2, "scale": 1.0, "name_of": "a", "sizes": None, "both": False}
    assert find(spec).defaults() == full
    given = {"steps": "8", "scale": "2", "name_of": "12", "sizes": "[1, 2]", "both": "true"}
    with build(spec, tiny, **given) as method:
        assert method.options == {"steps": 8, "scale": 2.0, "name_of": "12", "sizes": [1, 2], "both": True}
        assert (method.steps, method.sizes, method.layer) == (8, [1, 2], [])
        torch.testing.assert_close(method(images(2, 16)), 2 * images(2, 16).mean(1))
        assert method.last.target_B is None
    for wrong in ({"steps": "x"}, {"steps": 1.5}, {"steps": True}, {"sizes": [1.5]}, {"both": 1}, {"_inner": 1}):
        with pytest.raises(UserError):
            build(spec, tiny, **wrong)
    sys.modules.pop("own_means")
