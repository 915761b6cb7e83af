"""Mutated weights and checkpoints: loaded, or refused in one printable line; no crash, no hang, no code run."""

import io
import json
import shutil
import zipfile

import casm_toys
import making
import pytest
import safetensors.torch
import torch
from mutate import mutate_bytes, mutate_json

from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.masknet.checkpoint import Checkpoints
from saltern.pipeline.masknet.localizer import Head, save_localizer
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.methods import build
from saltern.pipeline.models.weights import digest as weights_digest
from saltern.pipeline.models.weights import fit, read
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
NESTED = b"[" * 100_000
ODD = [torch.ones(2, 2).to_sparse(), torch.ones(1, dtype=torch.int64), torch.ones(0), torch.ones(3) * 1j, "text", None]


def load_weights(path):
    model = making.tiny()
    fit(model, read(path), str(path))
    model(torch.zeros(1, 3, 32, 32))


def expect_a_line(call, *given) -> bool:
    """Return whether the call refused its input."""
    try:
        call(*given)
    except UserError as error:
        said = str(error)
    else:
        return False
    assert said.isprintable(), repr(said)  # no line end either
    return True


def mutated_pt(raw, state, rng):
    """Change the file's bytes, one member of its zip, or a value or key of the state."""
    kind = rng.randrange(3)
    if kind == 0:
        return mutate_bytes(raw, rng)
    stream = io.BytesIO()
    if kind == 1:
        with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(stream, "w") as after:
            chosen = rng.choice(before.namelist())
            for name in before.namelist():
                content = before.read(name)
                after.writestr(name, mutate_bytes(content, rng) if name == chosen else content)
        return stream.getvalue()
    changed, key = dict(state), rng.choice(list(state))
    value = changed.pop(key)
    match rng.randrange(3):
        case 0:
            changed[key] = rng.choice(ODD)
        case 1:
            changed[rng.choice([7, ("a",), f"\x1b[2J{key}", f"model.{key}", "\u202e"])] = value
    torch.save(rng.choice([changed, {"state_dict": changed}, {"model": changed, "epoch": 1}]), stream)
    return stream.getvalue()


def test_mutated_files_of_weights(fuzz, tmp_path, monkeypatch):
    state = making.tiny().state_dict()
    stream = io.BytesIO()
    torch.save(state, stream)
    files = {"w.pt": stream.getvalue(), "w.safetensors": safetensors.torch.save(state)}
    refused = 0
    for rng in fuzz:
        name = rng.choice(list(files))
        raw = mutated_pt(files[name], state, rng) if name == "w.pt" else mutate_bytes(files[name], rng)
        (tmp_path / name).write_bytes(raw)
        refused += expect_a_line(load_weights, tmp_path / name)
    print(f"{fuzz.rounds} mutated files of weights, {refused} refused")
    assert fuzz.rounds < 20 or refused > 0


def test_mutated_checkpoints_of_casm(fuzz, tmp_path):
    model = casm_toys.small()
    request = casm_toys.request(tmp_path, tmp_path, side=32)
    training = Training(model, request.hyperparameters)
    config = {"classes": None, "model_classes": 5, "model": "casm_toys:small"}
    good = Checkpoints(tmp_path / "good").save(training.state_dict(pool=False), config, [])
    assert not expect_a_line(lambda: build("casm", model, checkpoint=str(good)))
    shutil.copytree(good, tmp_path / "bad")
    (tmp_path / "bad/state.json").write_bytes(NESTED)
    assert expect_a_line(lambda: build("casm", model, checkpoint=str(tmp_path / "bad")))
    refused = 0
    for rng in fuzz:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(good, tmp_path / "bad")
        name = rng.choice(["state.json", "state.json", "tensors.safetensors"])
        raw = (good / name).read_bytes()
        changed = mutate_json(raw, rng) if name == "state.json" else mutate_bytes(raw, rng)
        (tmp_path / "bad" / name).write_bytes(changed)
        refused += expect_a_line(lambda: build("casm", model, checkpoint=str(tmp_path / "bad")))
    print(f"{fuzz.rounds} mutated checkpoints of CASM, {refused} refused")
    assert fuzz.rounds < 20 or refused > 0
    assert json.loads((good / "state.json").read_bytes())["config"] == config


def test_mutated_localizers(fuzz, tmp_path):
    model, good, bad = casm_toys.small(), tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    head = Head(find_stages(model, 32).channels[2:])
    config = {"model": "casm_toys:small", "weights_digest": weights_digest(model), "steps": 9}
    save_localizer(good, config, {"head": head.state_dict()})
    assert not expect_a_line(lambda: build("localizer", model, input_side=32, checkpoint=str(good)))
    shutil.copytree(good, bad)
    (bad / "localizer.json").write_bytes(NESTED)
    refused = int(expect_a_line(lambda: build("localizer", model, input_side=32, checkpoint=str(bad))))
    assert refused
    for rng in fuzz:
        shutil.rmtree(bad)
        shutil.copytree(good, bad)
        name = rng.choice(["localizer.json", "localizer.safetensors"])
        raw = (good / name).read_bytes()
        (bad / name).write_bytes(mutate_json(raw, rng) if name.endswith("json") else mutate_bytes(raw, rng))
        refused += expect_a_line(lambda: build("localizer", model, input_side=32, checkpoint=str(bad)))
    print(f"{fuzz.rounds} mutated localizers, {refused} refused")
