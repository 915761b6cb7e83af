"""The processor and its run: every sample has its row, also a bad one, and the rows are correct."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from extracting import extract
from making import HELPERS, files, picture, tiny, write_shards, write_tar
from PIL import Image
from scipy import ndimage

from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.maps.encode import dequantise, unpack_mask
from saltern.pipeline.methods import build
from saltern.pipeline.models.classifiers import load
from saltern.pipeline.runs.manifest import load_run_folder, read_receipts
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.shards.decode import decode
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.saliency import read_metadata


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pa.concat_tables(
        [pq.read_table(f) for f in sorted(out.glob("data/**/*.parquet"))]
    ).to_pylist()
    return found


def holds(out: Path) -> bool:
    return not verify(*load_run_folder(str(out))).findings


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, "PNG")
    return stream.getvalue()


def test_rows_are_what_the_method_gives_alone(tmp_path: Path) -> None:
    """Each stored map, mask, box and score equals that of one image at a time by the method, scipy and numpy."""
    write_shards(tmp_path / "in", 2, 7)
    assert extract(tmp_path / "in", tmp_path / "run") == 0
    classifier = load("making:tiny")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (classifier.preprocess.mean, classifier.preprocess.std))
    found = rows(tmp_path / "run")
    assert [row["key"] for row in found] == [f"k{i:05}" for i in range(14)]
    with build("grad-cam", classifier.model, layer="body") as method:
        for i, row in enumerate(found):
            decoded = decode(picture(i), Preprocess(40, 32))
            x_BCHW = (torch.from_numpy(decoded.pixels_HWC).permute(2, 0, 1)[None] / 255 - mean) / std
            map_Bhw = method(x_BCHW, torch.tensor([i % 5]))
            assert isinstance(map_Bhw, torch.Tensor)
            logits = method.last.logits_BK.double()
            assert (row["label"], row["target"], row["predicted"]) == (i % 5, i % 5, int(logits.argmax()))
            assert row["score"] == pytest.approx(float(logits.softmax(1)[0, i % 5]), rel=1e-4)
            stored = dequantise(row["map"], "float32", (row["map_height"], row["map_width"]))
            np.testing.assert_allclose(stored, map_Bhw[0].numpy(), rtol=1e-4, atol=1e-7)
            if row["status"] == "zero_map":
                assert not stored.any()
                assert row["boxes"] == []
                assert row["mask_area"] == 0
                continue
            large = upsample(torch.from_numpy(stored)[None], (32, 32))[0].numpy()
            mask = unpack_mask(row["mask"], (32, 32))
            np.testing.assert_array_equal(mask, large >= np.float32(row["mask_threshold"]))
            assert row["mask_threshold"] == pytest.approx(large.mean(), rel=1e-3)
            assert row["mask_area"] == pytest.approx(mask.mean())
            labels, count = ndimage.label(mask)
            y, x = ndimage.find_objects(labels)[np.bincount(labels.ravel())[1 : count + 1].argmax()]
            sx, sy, ox, oy = row["geometry"]
            expected = [ox + sx * x.start, oy + sy * y.start, ox + sx * x.stop, oy + sy * y.stop]
            np.testing.assert_allclose(row["boxes"][0], expected, atol=0.51)
            assert (row["image_height"], row["image_width"]) == (60, 80)
    assert holds(tmp_path / "run")


def test_every_sample_has_its_row_and_reason(tmp_path: Path) -> None:
    good = picture(0)
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(good)).save(rotated, "JPEG", exif=exif)
    cmyk = io.BytesIO()
    Image.open(io.BytesIO(good)).convert("CMYK").save(cmyk, "JPEG")
    samples: list[tuple[str, dict[str, bytes | str]]] = [
        ("good", {"jpg": good, "cls": "1"}),
        ("grey", {"png": png(grey), "cls": "1"}),
        ("palette", {"png": png(grey, "P"), "cls": "1"}),
        ("deep", {"png": png(deep), "cls": "1"}),
        ("cmyk", {"jpg": cmyk.getvalue(), "cls": "1"}),
        ("rotated", {"jpg": rotated.getvalue(), "cls": "1"}),
        ("pixel", {"png": png(grey[:1, :1]), "cls": "1"}),
        ("strip", {"png": png(np.tile(grey[:1], (1, 60))), "cls": "1"}),
        ("cut", {"jpg": good[: len(good) // 2], "cls": "1"}),
        ("noise", {"jpg": b"no image at all", "cls": "1"}),
        ("unlabelled", {"jpg": good}),
        ("wordy", {"jpg": good, "cls": "cat"}),
        ("beyond", {"jpg": good, "cls": "5"}),
        ("imageless", {"cls": "1"}),
        ("good", {"jpg": good, "cls": "2"}),
        ("last", {"jpg": good, "cls": "1"}),
    ]
    write_tar(tmp_path / "in" / "odd.tar", samples)
    write_tar(tmp_path / "in" / "empty.tar", [])
    assert extract(tmp_path / "in", tmp_path / "run") == 0
    found = rows(tmp_path / "run")
    assert [(row["index"], row["key"]) for row in found] == [(i, key) for i, (key, _) in enumerate(samples)]
    bad = {row["index"]: row for row in found if row["status"] not in ("ok", "zero_map")}
    assert {index: row["status"] for index, row in bad.items()} == {
        8: "decode_failed",
        9: "decode_failed",
        10: "missing_label",
        11: "missing_label",
        12: "missing_label",
        13: "missing_image",
        14: "duplicate_key",
    }
    for row in bad.values():
        assert row["error"]
        assert all(row[name] is None for name in ("map", "mask", "boxes", "score", "target", "geometry"))
    assert "0..4" in bad[12]["error"]
    assert (found[5]["image_height"], found[5]["image_width"]) == (80, 60)
    assert pq.read_table(tmp_path / "run/data/empty.parquet").num_rows == 0
    assert holds(tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "no tar", "nothing"])
def test_a_broken_shard_fails_with_its_reason_and_the_rest_stands(tmp_path: Path, damage: str) -> None:
    write_shards(tmp_path / "in", 3, 5)
    broken = tmp_path / "in" / "part-000001.tar"
    whole = broken.read_bytes()
    broken.write_bytes({"cut": whole[:3000], "no tar": b"x" * 3000, "nothing": b""}[damage])
    assert extract(tmp_path / "in", tmp_path / "run") == 1
    assert sorted(files(tmp_path / "run")) == ["data/part-000000.parquet", "data/part-000002.parquet"]
    findings = verify(*load_run_folder(str(tmp_path / "run"))).findings
    assert [finding.shard for finding in findings] == ["part-000001"]
    assert "failed" in findings[0].reason
    # The same command again, once the tar is whole, does that shard and no other.
    before = files(tmp_path / "run")
    broken.write_bytes(whole)
    assert extract(tmp_path / "in", tmp_path / "run") == 0
    assert holds(tmp_path / "run")
    assert before.items() <= files(tmp_path / "run").items()
    assert not list(tmp_path.glob("run/failures/*"))


def test_a_sample_has_a_row_for_each_of_its_targets(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 6)
    assert extract(tmp_path / "in", tmp_path / "top", target="top:3") == 0
    found = rows(tmp_path / "top")
    assert [row["index"] for row in found] == [i for i in range(6) for _ in range(3)]
    for start in range(0, 18, 3):
        first, *others = found[start : start + 3]
        assert first["target"] == first["predicted"] == others[0]["predicted"]
        scores = [row["score"] for row in (first, *others)]
        assert scores == sorted(scores, reverse=True)
        assert len({row["target"] for row in (first, *others)}) == 3
    assert holds(tmp_path / "top")
    # The second target's map equals the map of a run with this class as its target.
    second = found[1]
    assert extract(tmp_path / "in", tmp_path / "class", target=f"class:{second['target']}") == 0
    again = rows(tmp_path / "class")[0]
    assert (again["target"], again["map"], again["boxes"]) == (second["target"], second["map"], second["boxes"])


def test_a_class_agnostic_method_has_no_target_and_needs_no_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "in" / "a.tar", [("k", {"jpg": picture(0)})])
    assert extract(tmp_path / "in", tmp_path / "run", method="odd_methods:Agnostic", layer=None) == 0
    (row,) = rows(tmp_path / "run")
    assert (row["status"], row["target"], row["score"], row["label"]) == ("ok", None, None, None)
    assert row["predicted"] is not None
    assert "has no effect" not in capsys.readouterr().err
    assert extract(tmp_path / "in", tmp_path / "new", method="odd_methods:Agnostic", layer=None, target="class:3") == 0
    assert "--target class:3 has no effect on odd_methods:Agnostic" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("size", ["native", "input"])
def test_maps_are_stored_as_asked(tmp_path: Path, dtype: str, size: str) -> None:
    write_shards(tmp_path / "in", 1, 5)
    assert extract(tmp_path / "in", tmp_path / "exact") == 0
    assert extract(tmp_path / "in", tmp_path / "run", map_dtype=dtype, map_size=size) == 0
    meta = read_metadata(pq.read_schema(next(tmp_path.glob("run/data/*.parquet"))))
    side = 32 if size == "input" else 4
    assert (meta["map_dtype"], meta["map_shape"]) == (dtype, [side, side])
    for row, exact in zip(rows(tmp_path / "run"), rows(tmp_path / "exact"), strict=True):
        wanted = torch.from_numpy(dequantise(exact["map"], "float32", (4, 4)))[None]
        stored = dequantise(row["map"], dtype, (side, side), row["map_lo"], row["map_hi"])
        step = float(wanted.max() - wanted.min()) / (255 if dtype == "uint8" else 1000)
        np.testing.assert_allclose(stored, upsample(wanted, (side, side))[0].numpy(), atol=step * 0.6 + 1e-6)
        assert row["mask"] == exact["mask"]  # made before the map was rounded


@pytest.mark.slow
def test_noise_follows_the_seed_and_the_key_not_the_batch(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 2, 5)
    weights = str(tmp_path / "tiny.pth")
    torch.save(load("making:tiny").model.state_dict(), weights)  # else they follow the seed, too
    smooth: dict[str, Any] = {"method": "smoothgrad", "layer": None, "map_dtype": "float32", "weights": weights}
    for name, wishes in (("four", {}), ("three", {"batch_size": 3}), ("other", {"seed": 1})):
        assert extract(tmp_path / "in", tmp_path / name, **smooth, options={"samples": 3}, **wishes) == 0
    four, three, other = (
        np.stack([np.frombuffer(row["map"], np.float32) for row in rows(tmp_path / name)])
        for name in ("four", "three", "other")
    )
    scale = np.abs(four).max()
    np.testing.assert_allclose(three, four, rtol=1e-4, atol=1e-5 * scale)
    assert (np.abs(other - four).max(1) > 1e-2 * scale).all()


def test_no_map_stores_masks_alone(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 5)
    assert extract(tmp_path / "in", tmp_path / "run", save_map=False) == 0
    assert {row["map"] for row in rows(tmp_path / "run")} == {None}
    assert all(row["mask"] for row in rows(tmp_path / "run"))


def test_zero_nan_and_overflow_are_flagged(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 4)
    assert extract(tmp_path / "in", tmp_path / "run", method="odd_methods:Odd", layer=None, map_dtype="float16") == 0
    found = rows(tmp_path / "run")
    assert [row["status"] for row in found] == ["nonfinite", "zero_map", "nonfinite", "ok"]
    assert found[0]["map"] is None
    assert found[1]["mask_area"] == 0
    assert not unpack_mask(found[1]["mask"], (32, 32)).any()
    assert all(row["error"] for row in found[:3])


def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 10)
    for method in ("Mean", "Hungry"):
        assert (
            extract(tmp_path / "in", tmp_path / method, method=f"odd_methods:{method}", layer=None, batch_size=8) == 0
        )
    receipts = read_receipts(*load_run_folder(str(tmp_path / "Hungry")))
    assert [receipt.batch_size for receipt in receipts.values()] == [2]
    pairs = zip(rows(tmp_path / "Mean"), rows(tmp_path / "Hungry"), strict=True)
    assert all((a["key"], a["mask"], a["status"]) == (b["key"], b["mask"], b["status"]) for a, b in pairs)


@pytest.mark.slow
def test_retry_failed_redoes_those_rows_and_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "in", 2, 6)
    wishes = {"method": "odd_methods:Fickle", "layer": None}
    assert extract(tmp_path / "in", tmp_path / "good", **wishes) == 0
    monkeypatch.setenv("FICKLE", "1")
    assert extract(tmp_path / "in", tmp_path / "run", **wishes) == 0
    first = rows(tmp_path / "run")
    assert [row["index"] for row in first if row["status"] != "ok"] == [0, 4, 0, 4]
    monkeypatch.delenv("FICKLE")
    assert extract(tmp_path / "in", tmp_path / "run", **wishes) == 0  # nothing is redone unasked
    assert rows(tmp_path / "run") == first
    assert extract(tmp_path / "in", tmp_path / "run", {"retry_failed": True}, **wishes) == 0
    assert {row["status"] for row in rows(tmp_path / "run")} == {"ok"}
    assert rows(tmp_path / "run") == rows(tmp_path / "good")
    assert holds(tmp_path / "run")


def test_limit_takes_the_first_samples(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 3, 5)
    assert extract(tmp_path / "in", tmp_path / "run", limit=7) == 0
    assert [row["key"] for row in rows(tmp_path / "run")] == [f"k{i:05}" for i in range(7)]
    assert holds(tmp_path / "run")


def test_a_resume_reuses_what_moves_last_bits(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 5)
    assert extract(tmp_path / "in", tmp_path / "run", batch_size=3) == 0
    assert extract(tmp_path / "in", tmp_path / "run", batch_size=None, torch_threads=None) == 0
    with pytest.raises(UserError, match="batch_size: 3 there, 4 requested"):
        extract(tmp_path / "in", tmp_path / "run", batch_size=4)


def test_overwrite_starts_afresh(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 5)
    assert extract(tmp_path / "in", tmp_path / "run") == 0
    assert extract(tmp_path / "in", tmp_path / "run", {"overwrite": True}, target="top1") == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["target"] == "top1"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs(tmp_path: Path, precision: str) -> None:
    write_shards(tmp_path / "in", 1, 5)
    assert extract(tmp_path / "in", tmp_path / "run", precision=precision) == 0
    assert extract(tmp_path / "in", tmp_path / "full") == 0
    for half, full in zip(rows(tmp_path / "run"), rows(tmp_path / "full"), strict=True):
        assert half["score"] == pytest.approx(full["score"], abs=0.02)


def test_other_weights_on_a_worker_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory that makes other weights at each call would give each worker another model."""
    import making

    made = iter(range(1, 100))

    def unseeded() -> torch.nn.Module:
        model = tiny()
        torch.nn.init.constant_(next(model.parameters()), next(made))
        return model

    monkeypatch.setattr(making, "unseeded", unseeded, raising=False)
    write_shards(tmp_path / "in", 1, 5)
    with pytest.raises(UserError, match="are not the run's"):
        extract(tmp_path / "in", tmp_path / "run", model="making:unseeded")


def test_verify_finds_what_was_tampered_with(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 3, 5)
    assert extract(tmp_path / "in", tmp_path / "run") == 0
    paths = sorted(tmp_path.glob("run/data/*.parquet"))
    paths[0].write_bytes(paths[0].read_bytes()[:-1] + b"x")
    paths[1].unlink()
    (tmp_path / "run/data/stranger.parquet").write_bytes(b"")
    (tmp_path / "in/part-000002.tar").write_bytes((tmp_path / "in/part-000001.tar").read_bytes())
    reasons = {finding.shard: finding.reason for finding in verify(*load_run_folder(str(tmp_path / "run"))).findings}
    assert "digest" in reasons["part-000000"]
    assert "missing" in reasons["part-000001"]
    assert "written again with other content" in reasons["part-000002"]
    assert "no shard" in reasons["data/stranger.parquet"]
