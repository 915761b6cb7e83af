"""Target layers: what is recorded and kept, modules that run several times, layers that give tuples or nothing."""

import pytest
import torch
from references import agree
from torch import nn

from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError


def test_grad_cam_records_nothing_below_its_layer(tiny, images):
    recorded = {}
    for name in ("stem", "stage1", "stage2", "fc"):

        def note(module, args, output, name=name):
            recorded[name] = output.requires_grad

        getattr(tiny, name).register_forward_hook(note)
    build("grad-cam", tiny, layer="stage1")(images(2, 16))
    # This hook is older than the method's own, and so still sees stage1 before it is differentiable.
    assert recorded == {"stem": False, "stage1": False, "stage2": True, "fc": True}
    build("cam", tiny)(images(2, 16))
    assert set(recorded.values()) == {False}


def test_several_layers_in_one_pass(tiny, images):
    x, passes = images(3, 16), []
    names = ["stage2", "stem", "stage1.0"]
    alone = [build("grad-cam", tiny, layer=name)(x) for name in names]
    with build("grad-cam", tiny, layer=names) as method:
        tiny.stem.register_forward_hook(lambda *_: passes.append(1))
        together = method(x)
        assert method.layer == names
    assert len(passes) == 1
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
    assert isinstance(build("grad-cam", tiny, layer=["stage2"])(x), torch.Tensor)


def test_in_place_relu_after_the_layer_does_not_change_its_activation(tiny, images):
    x, target = images(2, 16), torch.tensor([1, 2])
    with build("grad-cam", tiny, layer="stage2.1") as method:
        in_place = method(x, target)
    tiny.stage2[2].inplace = False
    with build("grad-cam", tiny, layer="stage2.1") as method:
        torch.testing.assert_close(method(x, target), in_place)


def test_a_module_that_runs_several_times_counts_with_its_last_run(network, images):
    x = images(2, 64)
    expected = build("grad-cam", network("resnet18"), layer="layer4")(x)
    recorded = []
    inner = network("resnet18").layer4[1].conv2  # between the two runs of the block's one ReLU
    handle = inner.register_forward_hook(lambda module, args, output: recorded.append(output.requires_grad))
    with build("grad-cam", network("resnet18"), layer="layer4.1.relu") as method:
        for _ in range(2):
            torch.testing.assert_close(method(x), expected)
    handle.remove()
    assert recorded == [True, False]  # how often it runs is learnt in the first call


def test_a_module_that_runs_more_and_less_often_from_call_to_call(tiny, images):
    class Repeating(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.mix, self.times = tiny, nn.Conv2d(3, 3, 1), 1

        def forward(self, x):
            for _ in range(self.times):
                x = self.mix(x)
            return self.net(x)

    def fresh(times):
        model.times = times
        return build("grad-cam", model, layer="mix")(images(2, 16))

    model = Repeating()
    expected = {times: fresh(times) for times in (1, 2, 3)}
    with build("grad-cam", model, layer="mix") as method:
        for model.times in (1, 3, 1, 2, 2):
            torch.testing.assert_close(method(images(2, 16)), expected[model.times])
    assert not torch.allclose(expected[1], expected[3], rtol=1e-2)


def test_a_layer_that_gives_a_tuple(tiny, images):
    class Pair(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x), None

    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    x = images(2, 16)
    expected = build("grad-cam", tiny, layer="stage1")(x)
    tiny.stage1 = nn.Sequential(Pair(tiny.stage1), First())
    torch.testing.assert_close(build("grad-cam", tiny, layer="stage1.0")(x), expected)


def test_a_layer_beside_the_path_to_the_logits(tiny, images):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.beside = tiny, nn.Conv2d(3, 3, 1)

        def forward(self, x):
            self.beside(x)
            return self.net(x)

    with (
        build("grad-cam", Beside(), layer="beside") as method,
        pytest.raises(UserError, match="do not depend on layer"),
    ):
        method(images(2, 16))


def test_a_model_that_gives_no_logits(tiny, images):
    with build("gradient", tiny.stem) as method, pytest.raises(UserError, match="must return logits"):
        method(images(2, 16))


@pytest.mark.parametrize("name", ["cam", "grad-cam", "guided-backprop", "relevance-cam", "ablation-cam"])
def test_heads_that_serve_training_alone_do_not_matter(name, network, images):
    plain, x = network("googlenet"), images(1, 96)
    from thin import thin  # imports torchvision, which takes seconds

    with_heads = thin("googlenet", aux_logits=True).train()
    with_heads.load_state_dict(plain.state_dict(), strict=False)
    target = plain(x).argmax(1)
    with build(name, plain) as expected, build(name, with_heads) as found:
        agree(found(x, target), expected(x, target), "without auxiliary heads", name, rtol=1e-6)
    assert with_heads.training
    assert isinstance(with_heads(torch.cat([x, x])), tuple)  # in training it has three
