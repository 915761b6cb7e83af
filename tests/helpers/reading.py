"""Checks on both ways to read a shard: its samples, and only its keys."""

import io
import tarfile

import pytest

from saltern.pipeline.shards.samples import Sample, list_keys, read_samples
from saltern.schemas.errors import ShardError
from saltern.schemas.run import Shard

BLOCK = 512  # bytes


def read(shard: Shard) -> list[Sample]:
    """Return all samples, after checking that `list_keys` gives the same keys."""
    found = list(read_samples(shard))
    assert list_keys(shard) == [sample.key for sample in found]
    assert [sample.index for sample in found] == list(range(len(found)))
    return found


def fails(shard: Shard, *words: str) -> str:
    """Return the message of the ShardError that both ways raise, after checking that it has the URL and the words."""
    with pytest.raises(ShardError) as read_error:
        list(read_samples(shard))
    with pytest.raises(ShardError) as keys_error:
        list_keys(shard)
    reason = str(read_error.value)
    assert reason == str(keys_error.value)
    assert reason.startswith(shard.url)
    assert "\n" not in reason
    for word in words:
        assert word in reason
    return reason


def header_at(content: bytes, member: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmember(member).offset
