"""Each family gives the numbers of its functions on the run's images, on each engine and whatever the batches are."""

import math
from dataclasses import replace
from pathlib import Path

import making
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from extracting import extract
from making import Tiny, picture, write_tar
from torch import Tensor

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.methods import build
from saltern.pipeline.metrics.controls import control, sample_seeds
from saltern.pipeline.metrics.evaluate import EvaluateRequest, Evaluation, evaluate
from saltern.pipeline.metrics.faithfulness.composite import adcc, coherency, complexity
from saltern.pipeline.metrics.faithfulness.confidence import average_drop, densities
from saltern.pipeline.metrics.faithfulness.curves import deletion, insertion
from saltern.pipeline.metrics.faithfulness.families import ConfidenceFamily
from saltern.pipeline.metrics.faithfulness.passes import black_level
from saltern.pipeline.metrics.faithfulness.road import road
from saltern.pipeline.metrics.faithfulness.statistics import map_statistics
from saltern.pipeline.metrics.table import remarks
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.manifest import load_run
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EvaluateConfig
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import CONTROLS, FOUND
from saltern.schemas.saliency import DECODE_FAILED

SAMPLES = 6
NETWORK = ("perturbation", "confidence", "road", "composite")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six samples in two shards; the second image is broken."""
    folder = tmp_path_factory.mktemp("families")
    for shard in range(2):
        images = [b"no image" if (shard, at) == (0, 1) else picture(3 * shard + at, 44, 60) for at in range(3)]
        write_tar(
            folder / f"shards/{shard}.tar", [(f"k{shard}{at}", {"jpg": image}) for at, image in enumerate(images)]
        )
    assert extract(folder / "shards", folder / "run", target="top1") == 0
    return folder / "run"


def judge(run: Path, *metrics: str, batch_size: int = 2, **options: object) -> Evaluation:
    wanted = {"engine": "local", "device": "cpu", **options}
    return evaluate(
        EvaluateRequest([str(run)], metrics=metrics, batch_size=batch_size, torch_threads=1),
        RunOptions(str(run), **wanted),  # type: ignore[arg-type]
    )


def inputs(run: Path) -> tuple[Tiny, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the network, the pixels, x_BCHW, the maps at the input, the targets and the seeds, made one by one."""
    opened = open_run(str(run))
    config = opened.config
    pairs = [(sample, rows[0]) for shard in opened.shards for sample, rows in opened.joined(shard)]
    usable = [(sample, row) for sample, row in pairs if row.status == "ok"]
    pixels = torch.stack(
        [torch.from_numpy(decode(sample.image or b"", config.preprocess).pixels_HWC) for sample, _ in usable]
    )
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.preprocess.mean, config.preprocess.std))
    x_BCHW = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    map_BHW = torch.stack([torch.from_numpy(row.map("input")) for _, row in usable])
    model = classifiers.load("making:tiny", "DEFAULT", seed=0, side=32).model
    target_B = torch.tensor([row.target for _, row in usable])
    return model, pixels, x_BCHW, map_BHW, target_B, sample_seeds(0, [row.key for _, row in usable])


def stored(run: Path, family: str, subject: str, column: str) -> np.ndarray:
    folder = run / "metrics" / f"{family}{'' if subject == FOUND else '-controls'}" / "data"
    rows = [row for path in sorted(folder.iterdir()) for row in pq.read_table(path).to_pylist()]
    return np.array([row[column] for row in rows if row["subject"] == subject and row["status"] == "ok"], float)


@pytest.mark.slow
def test_the_values_are_those_of_the_functions(run: Path) -> None:
    evaluation = judge(run, *NETWORK, "statistics")
    model, pixels, x_BCHW, found_BHW, target_B, seed_B = inputs(run)
    assert len(pixels) == SAMPLES - 1
    for subject in (FOUND, *CONTROLS):
        map_BHW = found_BHW if subject == FOUND else control(subject, pixels, seed_B)
        given = model, x_BCHW, map_BHW, target_B
        black = torch.zeros(3, 1, 1)
        drop, density, figures = average_drop(*given, black), densities(*given, black), map_statistics(map_BHW)
        expected = {
            ("perturbation", "insertion"): insertion(*given).area_B,
            ("perturbation", "deletion"): deletion(*given).area_B,
            ("confidence", "average_drop"): drop.drop_B,
            ("confidence", "increase"): drop.increase_B.float(),
            ("confidence", "rho_plus"): density.positive_B,
            ("confidence", "rho_minus"): density.negative_B,
            ("road", "road"): road(*given, seed_B).combined_B,
            ("statistics", "total_variation"): figures.total_variation_B,
            ("statistics", "entropy"): figures.entropy_B,
        }
        estimates = evaluation.runs[0].estimates if subject == FOUND else evaluation.controls[subject]
        for (family, column), values_B in expected.items():
            np.testing.assert_allclose(stored(run, family, subject, column), values_B, rtol=1e-4, atol=2e-6)
            mean = float(values_B.double().nanmean())
            assert estimates[column].value == pytest.approx(mean, rel=1e-4, abs=2e-6, nan_ok=True)
        coherent = stored(run, "composite", subject, "coherency")
        if subject == FOUND:
            both = adcc(torch.from_numpy(coherent).float(), complexity(map_BHW), drop.drop_B)
            np.testing.assert_allclose(stored(run, "composite", subject, "adcc"), both, rtol=1e-3, atol=1e-5)
        assert np.isnan(coherent).all() == (subject != FOUND)


@pytest.mark.slow
def test_maps_multiply_the_pixels_if_the_user_says_so(run: Path) -> None:
    request = EvaluateRequest([str(run)], metrics=["average-drop,rho-minus"], multiply="pixels", torch_threads=1)
    evaluation = evaluate(request, RunOptions(str(run), engine="local", device="cpu"))
    model, _, x_BCHW, map_BHW, target_B, _ = inputs(run)
    how = open_run(str(run)).config.preprocess
    given = model, x_BCHW, map_BHW, target_B, black_level(how.mean, how.std, "pixels", torch.device("cpu"))
    for column, values_B in (
        ("average_drop", average_drop(*given).drop_B),
        ("rho_minus", densities(*given).negative_B),
    ):
        np.testing.assert_allclose(stored(run, "confidence", FOUND, column), values_B, rtol=1e-4, atol=2e-6)
    assert "maps multiply the pixels, so 0 is black" in list(remarks(evaluation))
    other = judge(run, "average-drop")  # measured again
    assert other.runs[0].estimates["average_drop"] != evaluation.runs[0].estimates["average_drop"]
    assert "maps multiply the normalised image, so 0 is the mean colour" in list(remarks(other))
    with pytest.raises(UserError, match="--multiply 'bytes' is none of normalised, pixels"):
        evaluate(replace(request, multiply="bytes"), RunOptions(str(run), engine="local", device="cpu"))


def test_class_agnostic_maps_are_judged_by_the_top1_of_the_network_that_judges(run: Path) -> None:
    """`predicted` is another classifier's: CASM's, with a head of its own classes."""
    judge(run, "confidence")
    opened, how = open_run(str(run)), load_run(Store(str(run / "metrics/confidence")))
    assert how is not None
    family = ConfidenceFamily(opened.config, how.config_of(EvaluateConfig), torch.device("cpu"))
    rows = [row for row in opened if row.status == "ok"]
    _, pixels, _, map_BHW, target_B, _ = inputs(run)
    expected = family.measure_maps(FOUND, rows, map_BHW, pixels)
    others = [replace(row, target=(row.target + 1) % 10, predicted=(row.target + 1) % 10) for row in rows]  # type: ignore[operator]
    agnostic = [replace(row, target=None, score=None) for row in others]
    assert [row.target for row in rows] == target_B.tolist() != [row.predicted for row in agnostic]
    found, wrong = (family.measure_maps(FOUND, given, map_BHW, pixels) for given in (agnostic, others))
    assert all(torch.equal(found[name], values_B) for name, values_B in expected.items())
    assert not torch.equal(wrong["average_drop"], expected["average_drop"])


@pytest.mark.slow
def test_the_noise_of_a_method_is_that_of_each_sample(run: Path, tmp_path: Path) -> None:
    wishes = {"method": "smoothgrad", "layer": None, "options": {"samples": 2}, "map_dtype": "float32"}
    assert extract(run.parent / "shards", tmp_path / "run", target="top1", **wishes) == 0
    judge(tmp_path / "run", "coherency")
    model, _, x_BCHW, map_BHW, target_B, seed_B = inputs(tmp_path / "run")
    with build("smoothgrad", model, samples=2) as method:
        explain = lambda x_BCHW, target_B: method(x_BCHW, target_B, seed_B)  # noqa: E731
        expected_B = coherency(explain, x_BCHW, map_BHW, target_B, torch.zeros(3, 1, 1))
    np.testing.assert_allclose(stored(tmp_path / "run", "composite", FOUND, "coherency"), expected_B, rtol=1e-3)


def test_a_sample_that_failed_in_the_run_keeps_a_row_without_values(run: Path) -> None:
    evaluation = judge(run, "confidence")
    assert evaluation.runs[0].estimates["average_drop"].count == SAMPLES - 1
    assert list(evaluation.runs[0].census.failed) == ["0: k01"]
    rows = pq.read_table(run / "metrics/confidence/data/0.parquet").to_pylist()
    assert [(row["key"], row["status"]) for row in rows] == [("k00", "ok"), ("k01", DECODE_FAILED), ("k02", "ok")]
    assert rows[1]["average_drop"] is None


@pytest.mark.slow
def test_workers_of_a_cluster_give_the_same_files(run: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(making.__file__).parent)  # where the workers find the network
    judge(run, "confidence")
    names = [path.relative_to(run) for path in (run / "metrics").rglob("confidence*/data/*")]
    assert len(names) == 4
    before = {name: (run / name).read_bytes() for name in names}
    for name in names:
        (run / str(name).replace("/data/", "/receipts/").replace(".parquet", ".json")).unlink()
    judge(run, "confidence", engine="ray", address=ray_address, workers=2)
    assert {name: (run / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_the_size_of_batches_is_kept_by_an_evaluation_that_goes_on(run: Path) -> None:
    judge(run, "road", batch_size=2)
    (run / "metrics/road/receipts/1.json").unlink()
    request = EvaluateRequest([str(run)], metrics=["road"])
    evaluate(request, RunOptions(str(run), engine="local"))
    assert '"batch_size": 2' in (run / "metrics/road/receipts/1.json").read_text()


def test_intervals_hold_the_mean_and_shrink_with_the_samples(run: Path) -> None:
    evaluation = judge(run, "statistics")
    estimate = evaluation.runs[0].estimates["entropy"]
    values = stored(run, "statistics", FOUND, "entropy")
    assert estimate.low < values.mean() < estimate.high
    assert estimate.plus_minus == pytest.approx(1.96 * values.std() / math.sqrt(len(values)), rel=0.4)
    assert replace(estimate, low=0.0, high=1.0).plus_minus == 0.5
