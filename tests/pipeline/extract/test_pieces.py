"""Pieces of a shard are bounded by images and bytes; a decoder on a device gets whole batches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extracting import REQUEST, extract
from making import HELPERS, files, picture, write_tar

from saltern.pipeline.extract import processor as module
from saltern.pipeline.extract.batch import Piece
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import resolve
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.shards.decoder import DecodedBatch, make_decoder
from saltern.schemas.config import Preprocess


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write 23 samples: one without an image, one damaged."""
    monkeypatch.chdir(HELPERS)
    images = [b"damaged" if i == 9 else picture(i) for i in range(23)]
    samples = [(f"k{i}", {"txt" if i == 5 else "jpg": image, "cls": "1"}) for i, image in enumerate(images)]
    return write_tar(tmp_path / "in/a.tar", samples)


def test_a_piece_ends_at_its_bytes_and_files_do_not_depend_on_it(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[tuple[int, int, int]] = []  # samples, images, bytes
    start = Piece.start

    def note(piece: Piece, *given: object) -> Piece:
        pieces.append((len(piece), len(piece.images), piece.size))
        return start(piece, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Piece, "start", note)
    assert extract(shard, tmp_path / "usual", {"decode_threads": 1}) == 0
    assert [images for _, images, _ in pieces] == [4, 4, 4, 4, 4, 2]  # half of what is decoded ahead
    assert max(samples for samples, _, _ in pieces) == 5
    pieces.clear()
    limit, largest = 3 * len(picture(0)) // 2, max(len(picture(i)) for i in range(23))
    monkeypatch.setattr(module, "_PIECE_BYTES", limit)
    assert extract(shard, tmp_path / "small", {"decode_threads": 1}) == 0
    assert max(size for _, _, size in pieces) < limit + largest
    assert max(images for _, images, _ in pieces) == 3  # the damaged one has 7 bytes
    assert files(tmp_path / "small") == files(tmp_path / "usual")


def test_many_threads_have_a_piece_each(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    start = Piece.start
    monkeypatch.setattr(Piece, "start", lambda piece, *given: decoded.append(len(piece.images)) or start(piece, *given))
    assert extract(shard, tmp_path / "run", {"decode_threads": 8}) == 0
    assert set(decoded) <= {0, 1}


class OnDevice:
    """Decoder that claims another device than the host, and notes the sizes of its calls."""

    name, device = "device", torch.device("meta")

    def __init__(self, preprocess: Preprocess) -> None:
        self._decoder = make_decoder(preprocess)
        self.sizes: list[int] = []

    def __call__(self, images: Sequence[bytes]) -> DecodedBatch:
        self.sizes.append(len(images))
        return self._decoder(images)


def test_a_decoder_on_a_device_gets_whole_batches(shard: Path, tmp_path: Path) -> None:
    run, _ = resolve(replace(REQUEST, shards=[str(shard)], torch_threads=1), None, "cpu", 1)
    decoder = OnDevice(run.config.preprocess)
    processor = Processor(Spec(run, str(tmp_path), ".", "cpu", 8), Extraction, decoder)
    made = processor.process(run.shards[0])
    processor.close()
    assert decoder.sizes == [4, 4, 4, 4, 4, 2]
    assert made.receipt.statuses == {"decode_failed": 1, "missing_image": 1, "ok": 21}
