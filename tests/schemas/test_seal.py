"""Sealed files: whatever differs from what was written is refused."""

from dataclasses import asdict, replace

import pytest
from made_run import config
from mutate import mutate_bytes, mutate_json

from saltern.schemas.config import ExtractConfig
from saltern.schemas.errors import UserError, printable
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Run, Shard
from saltern.schemas.seal import seal

RECEIPT = Receipt(
    "part", 10, "f" * 16, 3, 3, {"ok": 3}, "0" * 64, 99, {"read": 1, "total": 2.5}, "host:1", 16, content="0" * 8
)


def run_of(config: ExtractConfig, **more: str) -> Run:
    shards = [Shard("part", "/in/part.tar", 10, None, 5)]
    return Run(config, shards, {"saltern": "0.2.0"} | more, config.fingerprint(), ["cat"])


def test_files_read_back() -> None:
    assert Receipt.from_json(RECEIPT.to_json()) == RECEIPT
    failure = Failure("part", "data", "no tar", 1)
    assert Failure.from_json(failure.to_json()) == failure
    run = run_of(config())
    assert Run.from_json(run.to_json()) == run


def test_any_changed_byte_is_refused(fuzz) -> None:
    raw, run = RECEIPT.to_json(), run_of(config()).to_json()
    for rng in fuzz:
        for mutate in (mutate_bytes, mutate_json):
            if (changed := mutate(raw, rng)) != raw:
                with pytest.raises(ValueError):  # noqa: PT011 - json and the seal have words of their own
                    Receipt.from_json(changed)
            if (changed := mutate(run, rng)) != run:
                with pytest.raises(UserError, match=r"run\.json|the run's config"):
                    Run.from_json(changed)
        if fuzz.rounds > 2000:
            break


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shard": 3}, "'shard' is 3"),
        ({"rows": True}, "'rows' is True"),
        ({"statuses": {"ok": "3"}}, "'statuses' is"),
        ({"mtime_ns": 1.5}, "'mtime_ns' is 1.5"),
        ({"colour": "red"}, "the key 'colour' is unknown"),
    ],
)
def test_a_sealed_receipt_of_wrong_types_is_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Receipt.from_json(seal(asdict(RECEIPT) | change))


def test_a_missing_key_is_refused() -> None:
    stored = asdict(RECEIPT)
    del stored["digest"]
    with pytest.raises(ValueError, match="the key 'digest' is missing"):
        Receipt.from_json(seal(stored))


def test_the_fingerprint_is_that_of_the_config() -> None:
    run = run_of(config())
    edited = replace(run, config=replace(config(), seed=99))
    with pytest.raises(UserError, match="its fingerprint is not that of its config"):
        Run.from_json(edited.to_json())


def test_text_cannot_steer_a_terminal() -> None:
    assert printable("plain Ünïcode 日本") == "plain Ünïcode 日本"
    assert printable("a\x1b[2J\nb\u202ec\udcff\u2028d") == "a\\x1b[2J\\nb\\u202ec\\udcff\\u2028d"
