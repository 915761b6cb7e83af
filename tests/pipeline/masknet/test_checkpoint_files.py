"""A training removes the files that it wrote, and no other in its folder."""

from pathlib import Path

import torch

from saltern.pipeline.masknet.checkpoint import KEPT, Checkpoints
from saltern.pipeline.masknet.members import Member


def test_old_checkpoints_and_pool_files_go_and_files_of_the_user_stay(tmp_path: Path) -> None:
    mine = ["pool/photo.jpg", "pool/mine.safetensors", "checkpoints/best/weights.pth"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "pool/.unfinished-9.safetensors").write_text("of a killed training")
    for step in range(1, KEPT + 3):
        member = Member(step, {"weight": torch.full((1,), float(step))})
        manifest = [{"step": step, "digest": member.digest}]
        Checkpoints(tmp_path).save({"steps_done": step, "pool_manifest": manifest}, {}, [member])
    kept = [*range(3, KEPT + 3)]
    assert sorted(path.name for path in (tmp_path / "pool").iterdir()) == sorted(
        ["photo.jpg", "mine.safetensors", *(f"{step}.safetensors" for step in kept)]
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(["best", *map(str, kept)])
    assert {(tmp_path / name).read_text() for name in mine} == {"mine"}
