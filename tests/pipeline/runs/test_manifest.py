"""run.json, receipts, resume."""

import hashlib
import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from saltern.pipeline.runs.begin import begin
from saltern.pipeline.runs.manifest import load_run, load_run_folder, read_failures, read_receipts, receipt_name
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import config_from_dict
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import PHASES, Failure, Receipt
from saltern.schemas.run import Run, Shard

CONFIG = {
    "model": "resnet50",
    "weights": "DEFAULT",
    "weights_digest": "d" * 64,
    "classes": 1000,
    "method": "grad-cam",
    "layer": ["layer4"],
    "options": {},
    "target": "label",
    "discretize": "mean:1",
    "map_size": "native",
    "map_dtype": "float32",
    "save_map": True,
    "resize": 256,
    "crop": 224,
    "squash": False,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "precision": "fp32",
    "seed": 0,
    "limit": None,
    "batch_size": 16,
    "torch_threads": 2,
}


def make_run(shards: int = 3, **changes: object) -> Run:
    config = config_from_dict({**CONFIG, **changes})
    wanted = [Shard(f"s{index:06}", f"/in/s{index:06}.tar", 1000) for index in range(shards)]
    return Run(config, wanted, {"torch": "2"}, config.fingerprint())


def make_receipt(run: Run, shard: Shard, **changes: object) -> Receipt:
    made = Receipt(
        shard=shard.name,
        size=shard.size,
        fingerprint=run.fingerprint,
        samples=1000,
        rows=1000,
        statuses={"ok": 998, "decode_failed": 2},
        digest="a" * 64,
        data_bytes=600_000,
        seconds={**dict.fromkeys(PHASES, 1.5), "total": 3.0},
        worker="host:1",
        batch_size=16,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def publish_receipt(store: Store, receipt: Receipt) -> None:
    store.write(receipt_name(receipt.shard), receipt.to_json())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def test_run_json_comes_back(store: Store) -> None:
    run = make_run()
    assert begin(store, run) == run
    assert begin(store, run) == run
    assert load_run(store) == run


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "vgg16"),
        ("weights_digest", "e" * 64),
        ("options", {"eps": 1e-6}),
        ("target", "top1"),
        ("crop", 192),
        ("precision", "bf16"),
        ("limit", 10),
        ("batch_size", 32),
        ("torch_threads", 1),
    ],
)
def test_another_config_is_refused_by_name(store: Store, key: str, value: object) -> None:
    begin(store, make_run())
    with pytest.raises(UserError, match=rf"{key}: .*there.*requested.*--overwrite") as caught:
        begin(store, make_run(**{key: value}))
    assert "\n" not in str(caught.value)


def test_fingerprint_marks_results_and_nothing_else() -> None:
    marked = make_run().fingerprint
    assert make_run(discretize="otsu").fingerprint != marked
    assert make_run(seed=1).fingerprint != marked
    assert make_run(weights="/else/where.pth", batch_size=64, torch_threads=8).fingerprint == marked


def test_other_shards_are_refused_and_new_sizes_are_taken(store: Store) -> None:
    run = make_run(3)
    begin(store, run)
    for shard in run.shards:
        publish_receipt(store, make_receipt(run, shard))
    with pytest.raises(UserError, match="shards: 1 added, 0 missing"):
        begin(store, make_run(4))
    grown = replace(run, shards=[replace(run.shards[0], size=2000), *run.shards[1:]])
    assert begin(store, grown) == grown
    assert load_run(store) == grown
    # The tar that changed is no longer done; the others are.
    assert sorted(read_receipts(store, grown)) == ["s000001", "s000002"]


def test_only_whole_receipts_of_this_run_count(store: Store) -> None:
    run = make_run(4)
    begin(store, run)
    publish_receipt(store, make_receipt(run, run.shards[0]))
    publish_receipt(store, make_receipt(run, run.shards[1], fingerprint="0" * 16))
    store.write(receipt_name(run.shards[2].name), b'{"shard": "s0000')
    assert sorted(read_receipts(store, run)) == ["s000000"]


def test_damaged_run_json_is_said(store: Store) -> None:
    Path(store.path).mkdir()
    for content, words in ((b"{", "damaged"), (b'{"schema_version": 99}', "schema version 99")):
        Path(store.full("run.json")).write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_run(store)


def test_unknown_config_key_names_the_nearest() -> None:
    made = json.loads(make_run().to_json())
    made["config"]["batchsize"] = 3
    made["versions"]["saltern"] = "0.1.0"
    del made["seal"]
    with pytest.raises(UserError, match=r"unknown key 'batchsize'.*did you mean 'batch_size'"):
        Run.from_json(json.dumps(made).encode())


def test_failures_of_done_shards_are_history(store: Store) -> None:
    for name in ("failures/a.json", "failures/b/c.json"):
        path = Path(store.full(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Failure(name[9:-5], "world", "gone", 3).to_json())
    assert sorted(read_failures(store, ["a"])) == ["b/c"]


@pytest.mark.slow
def test_a_run_of_many_done_shards_resumes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning a resume reads every receipt once (`saltern bench` measures the time) and with 10 kB each at most."""
    run = make_run(5_000)
    folder = Path(store.full("receipts"))
    folder.mkdir(parents=True)
    body, _ = make_receipt(run, run.shards[0]).to_json().split(b',\n "seal"')
    for shard in run.shards:
        raw = body.replace(b"s000000", shard.name.encode())
        with open(folder / f"{shard.name}.json", "wb") as file:
            file.write(raw + b',\n "seal": "' + hashlib.sha256(raw).hexdigest().encode() + b'"\n}')
    begin(store, run)
    reads: Counter[str] = Counter()
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda store, name: reads.update([name]) or read(store, name))
    tracemalloc.start()
    try:
        receipts = read_receipts(store, begin(store, run))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(receipts) == 5_000
    assert reads == Counter(["run.json", *(receipt_name(name) for name in receipts)])
    assert peak < 50_000_000


def test_the_runs_in_a_folder_are_named(tmp_path):
    for name in ("cam", "lrp"):
        begin(Store(f"{tmp_path}/runs/{name}"), make_run())
    (tmp_path / "runs/other").mkdir()
    with pytest.raises(UserError, match=rf"give one of the runs in it: {tmp_path}/runs/cam, {tmp_path}/runs/lrp$"):
        load_run_folder(f"{tmp_path}/runs/")
    with pytest.raises(UserError, match="holds no run"):
        load_run_folder(f"{tmp_path}/nothing")
