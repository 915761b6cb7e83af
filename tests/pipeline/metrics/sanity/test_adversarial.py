"""The overlap of maps with an attack's changes, against a loop, and of an attack run."""

from pathlib import Path

import pytest
import torch
from making import HELPERS, write_shards

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.metrics.sanity.adversarial import overlap
from saltern.pipeline.metrics.sanity.run import SanityRequest, sanity
from saltern.pipeline.synthesis.attack import AttackRequest, attacking
from saltern.schemas.config import PGD
from saltern.schemas.errors import UserError


def test_overlap_is_the_share_of_the_most_changed_pixels_among_the_most_salient() -> None:
    generator = torch.Generator().manual_seed(0)
    map_BHW, change_BHW = (torch.rand(5, 20, 30, generator=generator) for _ in range(2))
    found = overlap(map_BHW, change_BHW, 0.1)
    for number in range(5):
        salient = set(map_BHW[number].flatten().argsort(descending=True)[:60].tolist())
        changed = set(change_BHW[number].flatten().argsort(descending=True)[:60].tolist())
        assert float(found.overlap_B[number]) == pytest.approx(len(salient & changed) / 60)


def test_equal_values_at_the_border_count_in_part() -> None:
    """Four of eight pixels are wanted; two are higher and four share the border's value: each counts half."""
    map_1HW = torch.tensor([[[9.0, 9, 5, 5], [5, 5, 0, 0]]])
    change_1HW = torch.tensor([[[8.0, 0, 7, 6], [0, 0, 5, 0]]])
    assert float(overlap(map_1HW, change_1HW, 0.5).overlap_B) == pytest.approx((1 + 0.5 + 0.5) / 4)
    same = overlap(map_1HW, torch.zeros(1, 2, 4), 0.5)
    assert float(same.overlap_B) == pytest.approx(0.5)  # by chance
    assert float(same.spearman_B) == 0


@pytest.mark.slow
def test_an_attack_run_is_judged_by_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 1, 4)
    request = AttackRequest(
        [str(tmp_path / "in")], "making:tiny", "grad-cam", layer="body", resize=40, crop=32, batch_size=4,
        torch_threads=1, pgd=PGD(3, 2 / 255, 12 / 255, 1.0),
    )  # fmt: skip
    run = str(tmp_path / "run")
    assert conduct(attacking(request), RunOptions(run, device="cpu", engine="local")).code == 0
    found = sanity(SanityRequest(run, 3), RunOptions(run))
    assert found.summary["adversarial"]["images"] == 3
    assert 0 <= found.summary["adversarial"]["overlap"]["value"] <= 1
    assert (tmp_path / "run/metrics/sanity.json").exists()
    bare = AttackRequest(**{**vars(request), "save_images": False})
    other = str(tmp_path / "bare")
    assert conduct(attacking(bare), RunOptions(other, device="cpu", engine="local")).code == 0
    with pytest.raises(UserError, match="no pictures"):
        sanity(SanityRequest(other, 3), RunOptions(other))
