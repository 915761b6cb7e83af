"""Data-parallel training: worlds of 1 and 2 agree, ranks have one pool, and a killed rank changes no result."""

import hashlib
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from casm_toys import OFTEN, files, request, small
from faults import actors, run_here, until
from forked_workers import preload
from making import picture, write_tar
from ranked import start

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.casm.training.plan import make_plan
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.masknet.checkpoint import open_checkpoint
from saltern.pipeline.training.loop import run
from saltern.pipeline.training.ranks import Ranks
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Train warns of its own settings

RANK = "RayTrainWorker"  # the class of the ranks' actors
CPU = torch.device("cpu")
SAME = 2e-6  # of losses of worlds 1 and 2, in float32, after 18 steps; measured: 2e-7


def lines(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]


def train_as(ranks: Ranks, asked, drawn: bool = False) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr(curves, "draw", lambda root: None)
        return str(run(make_plan(asked, "cpu", None, print), ranks, print))


# --- ranks


def averaging(ranks: Ranks) -> list[list[float]]:
    draw = torch.Generator().manual_seed(ranks.rank)
    tensors = [
        torch.randn(2, 3, 4, 5, generator=draw).contiguous(memory_format=torch.channels_last),
        torch.randn((), generator=draw, dtype=torch.float64),
        torch.nn.Parameter(torch.randn(7, generator=draw)),
    ]
    ranks.average(tensors)
    return [tensor.detach().flatten().tolist() for tensor in tensors]


def test_the_average_of_ranks_is_the_mean_in_place(in_ranks):
    found = in_ranks(averaging)
    assert found[0] == found[1]
    draws = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for values, shape, dtype in zip(found[0], ((2, 3, 4, 5), (), (7,)), (None, torch.float64, None), strict=True):
        mean = torch.stack([torch.randn(shape, generator=draw, dtype=dtype) for draw in draws]).mean(0)
        torch.testing.assert_close(torch.tensor(values, dtype=dtype), mean.flatten())


def disagreeing(ranks: Ranks) -> None:
    ranks.agree("what is common", 1, "a")
    ranks.agree("the pool", ranks.rank)


def test_ranks_that_disagree_are_named_on_every_rank(in_ranks):
    assert (
        in_ranks(disagreeing) == ["UserError: ranks disagree on the pool: rank 0 and rank 1; start a new training"] * 2
    )


# --- worlds


@pytest.mark.parametrize("thinning", [THINNINGS["F"], OFTEN], ids=["F", "pool"])
def test_worlds_of_1_and_2_have_the_same_losses(thinning, shards, tmp_path, in_ranks):
    """With BatchNorm in eval mode and without dropout, the result does not depend on how ranks share a batch."""
    hyperparameters = Hyperparameters(
        thinning=thinning, lam="auto", pool_size=3, lr_classifier=0.01, seed=5, batch_norm="eval"
    )
    asked = request(shards, tmp_path / "one", model="casm_toys:calm", hyperparameters=hyperparameters)
    train_as(Ranks(CPU), asked)
    in_ranks(train_as, replace(asked, out=str(tmp_path / "two"), workers=2))
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 18
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        for key, value in alone.items():
            # A spread near 0 is a difference of large numbers.
            assert shared[key] == pytest.approx(value, rel=SAME, abs=1e-5 if key == "mask_std" else SAME), key
    if thinning is OFTEN:
        assert any(line["member"] >= 0 for line in one)


@pytest.mark.parametrize("draw", ["shared", "per-rank"])
def test_ranks_hold_the_same_pool_where_batches_move_their_statistics(draw, shards, tmp_path, in_ranks):
    """In train mode, BatchNorm statistics of ranks are averaged; without that, `agree` fails at a checkpoint."""
    hyperparameters = Hyperparameters(
        thinning=OFTEN, lam="auto", pool_size=3, lr_classifier=0.01, seed=5, pool_draw=draw
    )
    asked = request(shards, tmp_path / "run", hyperparameters=hyperparameters, workers=2)
    ended = in_ranks(train_as, asked)
    assert not [text for text in ended if str(text).startswith("UserError")]
    assert open_checkpoint(tmp_path / "run").step == 18


@pytest.mark.slow
def test_plans_of_ranks_differ_in_the_member_alone():
    hyperparameters = Hyperparameters(thinning=OFTEN, lam="auto", pool_size=3, pool_draw="per-rank")
    first, second = (Training(small(), hyperparameters, rank=rank) for rank in range(2))
    plans = [(first.plan(step), second.plan(step)) for step in range(60)]
    assert all((one.slot, one.member < 0) == (other.slot, other.member < 0) for one, other in plans)
    assert any(one.member != other.member for one, other in plans)


def with_another_pool(ranks: Ranks, asked) -> str:
    real = Training.step

    def step(self, x, label):
        log = real(self, x, label)
        self.pool.members[0] = replace(self.pool.members[0], step=-1)
        return log

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank:
            patch.setattr(Training, "step", step)
        return train_as(ranks, asked)


def test_a_pool_that_differs_is_found_at_the_checkpoint(shards, tmp_path, in_ranks):
    found = in_ranks(with_another_pool, request(shards, tmp_path / "run", workers=2))
    assert all("ranks disagree on the pool" in str(text) for text in found)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unequal_shards_end_on_every_rank(tmp_path, in_ranks):
    for name, count in (("a", 7), ("b", 1), ("c", 3)):
        samples = [(f"{name}{i}", {"jpg": picture(i), "cls": str(i % 6)}) for i in range(count)]
        write_tar(tmp_path / f"{name}.tar", samples)
    asked = request(tmp_path, tmp_path / "run", workers=2, epochs=2, steps_per_epoch=5)
    in_ranks(train_as, asked)
    assert len(lines(tmp_path / "run")) == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 5, "workers": 2}, "--batch-size 5 is of all workers, and 2 cannot share it equally"),
        ({"workers": 0}, "--workers 0: it must be 1 or more"),
    ],
)
def test_bad_worlds_are_refused(changed, message, shards, tmp_path):
    with pytest.raises(UserError, match=message):
        make_plan(request(shards, tmp_path / "run", **changed), "cpu", None, print)


# --- on Ray


def command(shards: Path, out: Path, address: str, *more: str) -> list[str]:
    """Return the arguments of `saltern` for the training that `on_two` runs without Ray."""
    settings = (
        "--preset",
        "published",
        "--lambda",
        "auto",
        "--pool-size",
        "3",
        "--lr-classifier",
        "0.01",
        "--seed",
        "5",
        "--thinning",
        "L100",
    )
    return [
        *("train-casm", str(shards), "--out", str(out), "--workers", "2"),
        *("--model", "casm_toys:slow", "--epochs", "4", "--steps-per-epoch", "6", "--batch-size", "4"),
        *("--side", "64", "--checkpoint-every", "4", "--address", address, "--device", "cpu", *settings, *more),
    ]


@pytest.fixture
def train_here(monkeypatch, ray_address):
    """Return a function that runs the `command` of its arguments in this process, and gives what it said."""
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # it would end the cluster of the tests
    preload("torch._dynamo", "saltern.pipeline.casm.training.train")  # of the ranks' first steps

    def trained(*given: object, code: int = 0) -> str:
        ended, said = run_here(command(*given))
        assert ended == code, said
        assert "Traceback" not in said
        return said

    return trained


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))


@pytest.fixture(scope="module")
def on_two(shards, tmp_path_factory, in_ranks) -> dict[str, str]:
    """Return the files of an undisturbed training by two ranks, without Ray, whose workers start slowly."""
    out = tmp_path_factory.mktemp("two") / "run"
    chosen = Hyperparameters(thinning=THINNINGS["L100"], lam="auto", pool_size=3, lr_classifier=0.01, seed=5)
    asked = request(shards, out, model="casm_toys:slow", hyperparameters=chosen, workers=2, epochs=4)
    in_ranks(train_as, asked, True)
    assert [line["step"] for line in lines(out)] == list(range(24))
    return {**files(out), "lock-driver": hashlib.sha256(b"").hexdigest()}


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_rank_change_no_bit(shards, on_two, tmp_path, ray_address, train_here, forking):
    out = tmp_path / "run"
    running = start(forking, tmp_path / "log", *command(shards, out, ray_address))
    until(lambda: checkpoints(out) or not running.is_alive(), timeout_s=300)
    time.sleep(random.uniform(0, 0.5))
    running.kill()
    running.join()
    assert running.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    until(lambda: not actors(RANK))
    before, over = checkpoints(out)[-1], threading.Event()

    def kill_one() -> None:
        until(lambda: over.is_set() or checkpoints(out)[-1] > before, timeout_s=300)
        time.sleep(random.uniform(0, 0.3))
        victims = actors(RANK)
        assert len(victims) == 2
        random.choice(victims).kill()

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_one)
        try:
            said = train_here(shards, out, ray_address, "--resume")
        finally:
            over.set()
        killed.result()
    assert "resumes at step" in said
    assert "a worker died (rank" in said
    assert "all of them start again at step" in said
    assert "in each of 2 workers here" in said
    assert files(out) == on_two


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_names_the_checkpoint(shards, tmp_path, ray_address, train_here, forking):
    out = tmp_path / "run"
    running = start(forking, tmp_path / "log", *command(shards, out, ray_address))
    until(lambda: checkpoints(out) or not running.is_alive(), timeout_s=300)
    os.kill(running.pid, signal.SIGINT)
    running.join(400)
    said = (tmp_path / "log").read_text()
    assert running.exitcode == 130, said
    assert "Traceback" not in said
    assert "the same command with --resume continues from it" in said
    until(lambda: not actors(RANK), timeout_s=30)
    pool = sorted((out / "pool").iterdir())
    pool[0].unlink()
    said = train_here(shards, out, ray_address, "--resume", code=2)
    assert f"the pool file {pool[0]} is missing" in said.splitlines()[-1]


def test_more_workers_than_the_cluster_has_are_refused_in_one_line(shards, tmp_path, ray_address, train_here):
    said = train_here(shards, tmp_path / "run", ray_address, "--workers", "4", code=2)
    assert "--workers 4 need 4 CPUs, and the cluster has 2" in said.splitlines()[-1]
