"""Made runs whose samples have boxes, and their evaluation."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from made_run import SIZE, Made, write_shard
from making import picture, write_tar

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.evaluate import EvaluateRequest, Evaluation, evaluate
from saltern.schemas.evaluation import FOUND


def annotate(made: Made, boxes: Callable[[str], bytes | None], samples: int = 5, member: str = "json") -> None:
    """Replace the tars by ones of the same size, with another json member, or another member, for each key."""
    for number, shard in enumerate(made.run.shards):
        members: dict[str, dict[str, bytes]] = {}
        for index in range(samples):
            key = f"s{number}k{index}"
            content = boxes(key)
            members[key] = {"jpg": picture(index, *SIZE), "cls": str(index).encode()}
            members[key] |= {} if content is None else {member: content.ljust(200)}
        write_tar(Path(shard.url), members.items())
        with Path(shard.url).open("ab") as tar:
            tar.write(bytes(shard.size - Path(shard.url).stat().st_size))


def judge(path: Path, shards: Sequence[str] = (), metrics: Sequence[str] = ("localization",)) -> Evaluation:
    return evaluate(EvaluateRequest([str(path)], shards, metrics), RunOptions(str(path), engine="local"))


def found_of(path: Path, shards: Sequence[str] = ()) -> dict[str, Estimate]:
    found = judge(path, shards).runs[0].estimates
    return {name: estimate for name, estimate in found.items() if estimate.count}  # NaN equals nothing


def rows_of(made: Made, folder: str = "localization", subject: str = FOUND) -> list[dict[str, Any]]:
    rows = [
        row
        for shard in made.run.shards
        for row in pq.read_table(made.path / f"metrics/{folder}/data/{shard.name}.parquet").to_pylist()
    ]
    return [row for row in rows if row["subject"] == subject]


def alter(made: Made, **changed: Any) -> None:
    """Replace values in some columns of all data files; a value can be a function of the row's key."""
    for number, shard in enumerate(made.run.shards):
        table = pq.read_table(made.data(number))
        rows = []
        for row in table.to_pylist():
            row |= {name: value(row["key"]) if callable(value) else value for name, value in changed.items()}
            rows.append(row)
        assert shard.name == table["shard"][0].as_py()
        write_shard(made, number, len({row["key"] for row in rows}), rows, (4, 4))


def forget(made: Made) -> None:
    """Remove the results of earlier evaluations."""
    shutil.rmtree(made.path / "metrics")


BLANK = b'{"boxes": []}'.ljust(200)
