"""Files of weights as people have them: wrapped, prefixed, quantised, pointers, TorchScript; one line for each."""

import re
import warnings
import zipfile

import making
import pytest
import safetensors.torch
import torch

from saltern.pipeline.models.classifiers import load
from saltern.schemas.errors import UserError

STATE = making.tiny().state_dict()


def fails(path) -> str:
    with pytest.raises(UserError) as caught:
        load("making:tiny", str(path), side=32)
    said = str(caught.value)
    assert "\n" not in said
    assert said.isprintable()
    return said


@pytest.mark.parametrize(
    "prefix", ["model.", "_orig_mod.", "module.", "model._orig_mod.", "_orig_mod.module.", "net.backbone."]
)
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    path = tmp_path / "w.ckpt.pt"
    state = {f"{prefix}{key}": value for key, value in STATE.items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(5)}, "epoch": 3}, path)
    torch.save(STATE, tmp_path / "plain.pt")
    plain = load("making:tiny", str(tmp_path / "plain.pt"), side=32)
    assert load("making:tiny", str(path), side=32).digest == plain.digest


def test_two_copies_of_the_weights_in_one_file_are_named_and_not_chosen_from(tmp_path):
    both = {f"{prefix}.{key}": value for prefix in ("model", "ema") for key, value in STATE.items()}
    torch.save(both, tmp_path / "w.pt")
    assert "unexpected: model.body.0.weight" in fails(tmp_path / "w.pt")


def test_values_of_another_kind_are_refused(tmp_path):
    weight = STATE["head.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    for value in (quantised, weight.to_sparse(), weight.to(torch.int8), weight.to(torch.complex64), weight.to("meta")):
        torch.save({**STATE, "head.weight": value}, tmp_path / "w.pt")
        said = fails(tmp_path / "w.pt")
        assert "of another kind: head.weight; save dense floating weights" in said


def test_keys_that_are_no_names_and_keys_with_escapes(tmp_path):
    torch.save({0: torch.ones(2), "a": torch.ones(2)}, tmp_path / "w.pt")
    assert "has the key 0, and keys must be names" in fails(tmp_path / "w.pt")
    torch.save({**STATE, "\x1b[2Jx\n": torch.ones(2)}, tmp_path / "w.pt")
    assert r"unexpected: \x1b[2Jx\n" in fails(tmp_path / "w.pt")


def test_a_pointer_and_torchscript_say_what_to_do(tmp_path):
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        assert "a pointer of Git LFS and not the file: run git lfs pull" in fails(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as archive:
        archive.writestr("s/constants.pkl", b"")
        archive.writestr("s/data.pkl", b"")
    assert "is TorchScript; save its weights: torch.save(torch.jit.load(FILE).state_dict()" in fails(tmp_path / "s.pt")


def test_what_the_messages_advise_makes_a_file_that_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save((net := making.tiny()).state_dict(), "plain.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit and quantised tensors are deprecated
        torch.jit.save(torch.jit.script(net), "s.pt")
        command = re.search(r"torch\.save\(.*\)", fails("s.pt"))[0]
        exec(command.replace("FILE", "'s.pt'"), {"torch": torch})  # noqa: S102
        made, plain = (load("making:tiny", name, side=32) for name in ("weights.pth", "plain.pt"))
        assert made.digest == plain.digest
        weight = torch.quantize_per_tensor(STATE["head.weight"], 0.1, 0, torch.qint8)
        for odd, dense in ((weight, weight.dequantize()), (STATE["head.weight"].to_sparse(), STATE["head.weight"])):
            torch.save({**STATE, "head.weight": odd}, "w.pt")
            assert "save dense floating weights" in fails("w.pt")
            torch.save({**STATE, "head.weight": dense}, "w.pt")
            load("making:tiny", "w.pt", side=32)


def test_a_file_that_is_no_zip_inside(tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    raw = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(raw[:-30] + bytes(30))
    assert "no readable weights file" in fails(tmp_path / "w.pt") or "damaged" in fails(tmp_path / "w.pt")
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-9])
    assert "no readable weights file" in fails(tmp_path / "w.safetensors")
