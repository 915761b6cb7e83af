"""The decoder belongs to a run: its name is in config, fingerprint and metadata, and a resumed run keeps it."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from extracting import extract
from making import HELPERS, picture, write_tar

from saltern.pipeline.extract import processor
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.shards.decoder import CpuDecoder, DecodedBatch, decode_jpeg
from saltern.pipeline.shards.nvjpeg import GpuDecoder
from saltern.schemas.config import PILLOW, ExtractConfig, Preprocess, config_from_dict
from saltern.schemas.errors import UserError
from saltern.schemas.saliency import read_metadata

TORCHCODEC = f"torchcodec {version('torchcodec')}"


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(HELPERS)
    for name in ("a", "b"):
        write_tar(tmp_path / f"in/{name}.tar", [(f"{name}{i}", {"jpg": picture(i, kind="JPEG")}) for i in range(3)])
    return tmp_path / "in"


def test_the_name_is_in_config_fingerprint_and_metadata(shards: Path, tmp_path: Path) -> None:
    assert extract(shards, tmp_path / "run", target="top1") == 0
    run = load_run_folder(str(tmp_path / "run"))[1]
    config = run.config_of(ExtractConfig)
    assert config.decoder == config.marked()["decoder"] == TORCHCODEC
    assert replace(config, decoder="torchcodec 0.1").fingerprint() != run.fingerprint
    metadata = read_metadata(pq.read_schema(tmp_path / "run/data/a.parquet"))
    assert metadata["config"]["decoder"] == TORCHCODEC


class OnGpu:
    """A GPU decoder whose device is the CPU, and nvJPEG torchcodec's function. It says that it is on a GPU."""

    name, device = "nvjpeg (test)", torch.device("cuda")

    def __init__(self, preprocess: Preprocess) -> None:
        plain = decode_jpeg()
        assert plain is not None
        rest, self.sizes = CpuDecoder(preprocess, plain), list[int]()
        self._decoder = GpuDecoder(rest, partial(plain, mode="RGB"), self.name, torch.device("cpu"), 2)

    def __call__(self, images: Sequence[bytes]) -> DecodedBatch:
        self.sizes.append(len(images))
        return self._decoder(images)


def test_a_gpu_decoder_gets_whole_batches_and_the_rows_are_those_of_the_cpu(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(i, kind="PNG" if i == 4 else "JPEG") if i not in (2, 7) else b"no image" for i in range(11)]
    write_tar(shards / "c.tar", [(f"c{i}", {"jpg": image}) for i, image in enumerate(images)])
    made: list[OnGpu] = []

    def make(preprocess: Preprocess, *_: object) -> OnGpu:
        made.append(OnGpu(preprocess))
        return made[-1]

    assert extract(shards, tmp_path / "cpu", target="top1") == 0
    monkeypatch.setattr(processor, "make_decoder", make)
    assert extract(shards, tmp_path / "gpu", target="top1") == 0
    assert sorted(made[0].sizes) == [3, 3, 3, 4, 4]  # batches have 4 samples
    tables = [pq.read_table(tmp_path / run / "data/c.parquet") for run in ("cpu", "gpu")]
    for column in ("key", "status", "error", "image_height", "image_width", "geometry"):
        assert tables[0][column].equals(tables[1][column]), column
    assert tables[0]["status"].to_pylist().count("decode_failed") == 2


def test_runs_of_older_versions_keep_their_fingerprint(shards: Path, tmp_path: Path) -> None:
    extract(shards, tmp_path / "run", target="top1")
    config = load_run_folder(str(tmp_path / "run"))[1].config_of(ExtractConfig)
    stored = config.to_dict()
    del stored["decoder"]
    old = config_from_dict(stored)
    assert isinstance(old, ExtractConfig)
    assert old.decoder == PILLOW
    assert old.to_dict() == stored
    assert old.differences(config) == [f"decoder: 'pillow' there, '{TORCHCODEC}' requested"]


def unfinished(shards: Path, out: Path) -> None:
    extract(shards, out, target="top1")
    (out / "receipts/b.json").unlink()
    (out / "data/b.parquet").unlink()


def test_a_resume_keeps_the_decoder(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchcodec.decoders", None)
        unfinished(shards, out)
    name = f"pillow {version('pillow')}"
    for choice in ("auto", "cpu"):
        assert extract(shards, out, target="top1", decode=choice) == 0
        assert load_run_folder(str(out))[1].config_of(ExtractConfig).decoder == name


def test_a_resume_without_the_decoder_is_refused_in_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    unfinished(shards, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=f"decoded by {TORCHCODEC}, and .* install that version") as error:
        extract(shards, out, target="top1")
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in before} == before


def test_another_choice_than_the_run_has_is_refused(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    unfinished(shards, out)
    run_json = out / "run.json"
    before = run_json.read_bytes()
    with pytest.raises(UserError, match=r"--decode gpu .* needs --device cuda"):
        extract(shards, out, target="top1", decode="gpu")
    assert run_json.read_bytes() == before
