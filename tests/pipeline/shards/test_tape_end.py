"""A tar ends with a block or two of zeros, padded to a record. A longer tail is that of a copy that stopped early."""

import gzip
import re
import subprocess
from pathlib import Path

import pytest
from reading import BLOCK, fails, header_at, read
from tars import samples, shard_at, tar_bytes

from saltern.schemas.run import Shard


def made_by_tar(tmp_path: Path, *options: str) -> Shard:
    """Return a shard of twelve samples that GNU tar packed."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in samples(12, b"image" * 200):
        (folder / name).write_bytes(data)
    subprocess.run(["tar", *options, "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."], check=True)
    return shard_at(tmp_path / "x.tar")


@pytest.mark.parametrize("blocks", [1, 2, 16, 20, 64, 128, 256, 512, 2048])
def test_records_that_gnu_tar_writes(tmp_path: Path, blocks: int) -> None:
    shard = made_by_tar(tmp_path, "-b", str(blocks))
    assert shard.size % (blocks * BLOCK) == 0
    assert len(read(shard)) == 12


@pytest.mark.parametrize("zeros", [1, 2])
def test_an_end_without_padding(tmp_path: Path, zeros: int) -> None:
    content = tar_bytes(samples(40))
    end = header_at(content, "s39.cls") + 2 * BLOCK
    assert len(read(shard_at(tmp_path / "x.tar", content[:end] + bytes(zeros * BLOCK)))) == 40


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("whole", [10_240 * 100, 512 * 2001])
def test_a_reserved_file_of_which_a_part_arrived(tmp_path: Path, share: float, whole: int) -> None:
    content = tar_bytes(samples(60, bytes(range(1, 251)) * 60))[:whole].ljust(whole, b"\0")
    arrived = content[: int(share * whole)].ljust(whole, b"\0")
    fails(shard_at(tmp_path / "x.tar", arrived), "bytes of zeros", "stopped early", "copy the shard again")


def test_a_tail_of_three_blocks(tmp_path: Path) -> None:
    content = tar_bytes(samples(40))
    end = header_at(content, "s39.cls") + 2 * BLOCK
    fails(shard_at(tmp_path / "x.tar", content[:end] + bytes(3 * BLOCK)), "1,536 bytes of zeros")


def test_a_compressed_tar_with_a_long_tail(tmp_path: Path) -> None:
    fails(shard_at(tmp_path / "x.tar.gz", gzip.compress(tar_bytes(samples(3)) + bytes(2_000_000))), "bytes of zeros")


def test_the_command_in_the_message_repairs_a_whole_tar(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "x.tar", tar_bytes(samples(3)) + bytes(30_001))
    command = re.search(r"`(truncate -s \d+)`", fails(shard, "bytes of zeros"))
    assert command
    subprocess.run([*command[1].split(), shard.url], check=True)
    assert len(read(shard_at(Path(shard.url)))) == 3
