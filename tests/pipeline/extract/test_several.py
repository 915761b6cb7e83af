"""Several methods in one command: each run has the bytes of a command with this method only, in any state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from extracting import REQUEST, extract
from making import HELPERS, files, picture, write_shards, write_tar

import saltern
from saltern.pipeline.engine.book import Book
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.runs.manifest import load_run_folder, read_receipts
from saltern.pipeline.runs.verify import verify
from saltern.schemas.errors import UserError

CAMS = "cam,grad-cam,grad-cam++,xgrad-cam,layer-cam,hires-cam,eigen-cam"
NO_LAYER = ("gradient", "odd_methods:Mean", "odd_methods:Fickle", "odd_methods:Hungry")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write two shards: samples without class, without image, and with a damaged one."""
    for number in range(2):
        samples: list[tuple[str, dict[str, Any]]] = [
            (f"k{number}{index}", {"jpg": picture(index + 11 * number), "cls": str(index % 5)}) for index in range(11)
        ]
        samples[3][1]["jpg"] = b"damaged"
        del samples[5][1]["cls"]
        samples[8] = (samples[8][0], {"txt": "no image", "cls": "1"})
        write_tar(tmp_path / f"in/part-{number}.tar", samples)
    return tmp_path / "in"


def single(shards: Path, out: Path, method: str, settings: dict[str, Any] | None = None, **wishes: Any) -> int:
    """Make the run of one method by a command of its own."""
    layer = None if method in NO_LAYER else "body"
    return extract(shards, out, settings, **{"method": method, "layer": layer, **wishes})


def check_equal(shards: Path, several: Path, methods: str, **wishes: Any) -> None:
    """Compare the runs below a folder with those of single commands."""
    for method in methods.split(","):
        one = several.with_name("single") / method
        single(shards, one, method, **wishes)
        assert files(several / method) == files(one), method
        assert len(files(one)) == 2
        assert (several / method / "run.json").read_bytes() == (one / "run.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "methods"),
    [
        ("label", f"{CAMS},gradient,odd_methods:Mean"),
        ("top1", "gradient,eigen-cam,layer-cam"),
        ("top:2", "layer-cam,eigen-cam,cam,gradient"),
    ],
)
def test_runs_have_the_bytes_of_single_commands(shards: Path, tmp_path: Path, target: str, methods: str) -> None:
    assert extract(shards, tmp_path / "runs", method=methods, target=target) == 0
    check_equal(shards, tmp_path / "runs", methods, target=target)
    for method in methods.split(","):
        assert verify(*load_run_folder(str(tmp_path / "runs" / method))).findings == []


@pytest.mark.slow
def test_cams_of_a_layer_share_one_forward_and_one_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import making

    passes: list[str] = []
    forward = making.Tiny.forward

    def counted(model: making.Tiny, x_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BK = forward(model, x_BCHW)
        if len(x_BCHW) == 7:
            passes.append("forward")
            if logits_BK.requires_grad:
                logits_BK.register_hook(lambda gradient: passes.append("backward"))
        return logits_BK

    monkeypatch.setattr(making.Tiny, "forward", counted)
    write_shards(tmp_path / "in", 3, 7)
    assert extract(tmp_path / "in", tmp_path / "runs", method=CAMS, batch_size=7) == 0
    # The first batch of a shape has two more forward passes, which show that both kinds of passes give the same bits.
    assert passes.count("forward") == 3 + 2
    assert passes.count("backward") == 3


@pytest.mark.slow
def test_only_the_runs_that_lack_a_shard_make_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "grad-cam,layer-cam,gradient"
    assert single(shards, tmp_path / "runs/gradient", "gradient") == 0  # one is complete, the others are new
    assert extract(shards, tmp_path / "runs", method="grad-cam,layer-cam", limit=None) == 0
    (tmp_path / "runs/layer-cam/receipts/part-1.json").unlink()  # a kill between two publications
    published: list[tuple[str, str]] = []
    publish = Book.publish

    def noted(book: Book, made: Any) -> Any:
        published.append((Path(book.store.path).name, made.receipt.shard))
        return publish(book, made)

    monkeypatch.setattr(Book, "publish", noted)
    capsys.readouterr()
    assert extract(shards, tmp_path / "runs", method=methods) == 0
    said = capsys.readouterr()
    assert published == [("layer-cam", "part-1")]
    assert "1 of 2 shards done in all runs, 1 to do" in said.err
    assert "layer-cam: 1 of 2 shards done" in said.err
    check_equal(shards, tmp_path / "runs", methods)
    assert extract(shards, tmp_path / "runs", method=methods) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_published_a_shard_does_not_make_it_again_when_another_failed_to(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saltern.pipeline.engine import driver

    monkeypatch.setattr(driver, "BACKOFF_S", (0.0, 0.0))
    published: list[str] = []
    publish, faults = Book.publish, [ConnectionError("the wire is gone")]

    def failing(book: Book, made: Any) -> Any:
        name = f"{Path(book.store.path).name} {made.receipt.shard}"
        if name == "layer-cam part-0" and faults:
            raise faults.pop()
        published.append(name)
        return publish(book, made)

    monkeypatch.setattr(Book, "publish", failing)
    assert extract(shards, tmp_path / "runs", method="grad-cam,layer-cam") == 0
    assert sorted(published) == sorted(
        f"{method} part-{number}" for method in ("grad-cam", "layer-cam") for number in (0, 1)
    )
    check_equal(shards, tmp_path / "runs", "grad-cam,layer-cam")


@pytest.mark.slow
def test_each_run_keeps_its_own_rows_with_retry_failed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that are done again are other ones in each run, so their batches are others too."""
    methods = ["odd_methods:Fickle", "grad-cam", "eigen-cam"]
    for settings in ({}, {"retry_failed": True}):
        if not settings:
            monkeypatch.setenv("FICKLE", "1")
        extract(shards, tmp_path / "runs", settings, method=",".join(methods))
        for method in methods:
            single(shards, tmp_path / "single" / method, method, settings)
        monkeypatch.delenv("FICKLE", raising=False)
    assert [files(tmp_path / "runs" / method) == files(tmp_path / "single" / method) for method in methods] == [
        True
    ] * 3


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_batches_of_one_method(shards: Path, tmp_path: Path) -> None:
    methods = "odd_methods:Hungry,grad-cam"
    assert extract(shards, tmp_path / "runs", method=methods, target="top1") == 0
    check_equal(shards, tmp_path / "runs", methods, target="top1")
    used = [read_receipts(*load_run_folder(str(tmp_path / "runs" / method))) for method in methods.split(",")]
    assert [receipts["part-1"].batch_size for receipts in used] == [2, 4]


def test_a_shard_that_fails_is_recorded_in_each_run_that_lacks_it(shards: Path, tmp_path: Path) -> None:
    methods = ["grad-cam", "gradient"]
    wishes = {"resize": 40, "crop": 32, "batch_size": 4, "torch_threads": 1, "device": "cpu", "engine": "local"}
    assert single(shards, tmp_path / "runs/gradient", "gradient") == 0
    (tmp_path / "runs/gradient/receipts/part-0.json").unlink()
    tar = shards / "part-1.tar"
    tar.write_bytes(tar.read_bytes()[:5000] + b"\0" * (tar.stat().st_size - 5000))
    given = {"model": "making:tiny", "method": methods, **wishes}
    result = saltern.extract(shards, tmp_path / "runs", **given)
    assert (result.code, result.shards, result.done) == (1, 2, 1)
    assert [*result.failures] == ["part-1"]
    assert [(each.code, each.done) for each in result.runs.values()] == [(1, 1), (1, 1)]
    for method in methods:
        assert (tmp_path / "runs" / method / "failures/part-1.json").exists()
        assert not (tmp_path / "runs" / method / "failures/part-0.json").exists()


@pytest.mark.slow
def test_either_form_replaces_and_resumes_the_runs_of_the_other(shards: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert extract(shards, runs, method="grad-cam,gradient", target="top1", batch_size=3) == 0
    assert single(shards, runs / "grad-cam", "grad-cam", {"overwrite": True}, batch_size=3) == 0
    with pytest.raises(UserError, match="gradient holds a run with another config: target"):
        extract(shards, runs, method="grad-cam,gradient,cam", batch_size=3)
    assert not (runs / "cam").exists()
    assert extract(shards, runs, {"overwrite": True}, method="grad-cam,gradient", batch_size=3) == 0
    # The run of cam, which is new, takes the batch size of the others.
    assert extract(shards, runs, method="grad-cam,gradient,cam", batch_size=None) == 0
    check_equal(shards, runs, "grad-cam,gradient,cam", batch_size=3)


def test_options_go_to_the_methods_that_have_them(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 2)
    options = {"eps": 1e-4, "reduce": "sum", "input-x-gradient:reduce": "l2"}
    methods = "grad-cam++,gradient,input-x-gradient,layer-cam"
    job = extraction(replace(REQUEST, shards=[str(tmp_path / "in")], method=methods, options=options))
    runs, _ = job.plan(dict.fromkeys(methods.split(",")), "cpu", 1)  # type: ignore[arg-type]
    made = {name: run.config for name, run in runs.items()}
    assert made["grad-cam++"].options == {"eps": 1e-4}
    assert made["gradient"].options["reduce"] == "sum"
    assert made["input-x-gradient"].options["reduce"] == "l2"
    assert made["layer-cam"].options == {}
    assert [made[name].layer for name in methods.split(",")] == [["body"], [], [], ["body"]]
    assert [made[name].map_dtype for name in methods.split(",")] == ["float32", "uint8", "float16", "float32"]


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"method": "grad-cam,layer-cam,grad-cam"}, "grad-cam is named twice"),
        ({"method": "grad-cam,"}, "a name is empty"),
        ({"method": "grad-cam,layercam"}, "unknown method 'layercam'"),
        (
            {"method": "grad-cam,gradient", "options": {"steps": 3}},
            "unknown key 'steps' in the options of grad-cam, gr",
        ),
        ({"method": "grad-cam,gradient", "options": {"cam:eps": 3}}, "'cam' is none of the methods grad-cam, gradient"),
        (
            {"method": "grad-cam,gradient", "options": {"gradient:eps": 3}},
            "unknown key 'eps' in the options of gradient",
        ),
        ({"method": "gradient,odd_methods:Mean"}, "none of gradient, odd_methods:Mean has a target layer"),
        ({"method": "grad-cam,gradient", "target": "class:99"}, "99"),
    ],
)
def test_what_is_refused_is_one_line_and_writes_nothing(
    shards: Path, tmp_path: Path, wishes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        extract(shards, tmp_path / "runs", **wishes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_folders_that_cannot_be_shared_are_refused_before_anything_is_written(shards: Path, tmp_path: Path) -> None:
    from saltern.pipeline.storage.session import session
    from saltern.pipeline.storage.store import Store

    assert single(shards, tmp_path / "run", "grad-cam") == 0
    with pytest.raises(UserError, match="is a run, and several methods write a run each in folders below --out"):
        extract(shards, tmp_path / "run", method="grad-cam,cam")
    runs = tmp_path / "runs"
    said = "another command is writing this run .* stop it, or use another folder"  # evaluate has no --out
    with session(Store(str(runs / "layer-cam"))), pytest.raises(UserError, match=said):
        extract(shards, runs, method="grad-cam,layer-cam")
    assert not (runs / "grad-cam").exists()
    assert single(shards, runs / "grad-cam", "grad-cam", batch_size=3) == 0
    assert single(shards, runs / "cam", "cam", batch_size=5) == 0
    with pytest.raises(UserError, match=r"has batch_size 3, that of cam 5: .* resume each by a command with one"):
        extract(shards, runs, method="grad-cam,cam", batch_size=None)


def test_workers_of_ray_make_all_runs(shards: Path, tmp_path: Path, ray_address: str) -> None:
    methods = "grad-cam,eigen-cam,gradient"
    settings = {"engine": "ray", "address": ray_address, "workers": 1}
    given = {"resize": 40, "crop": 32, "batch_size": 4, "torch_threads": 1, "device": "cpu", **settings}
    result = saltern.extract(shards, tmp_path / "runs", model="making:tiny", method=methods, layer="body", **given)
    assert (result.code, result.done) == (0, 2)
    check_equal(shards, tmp_path / "runs", methods)
