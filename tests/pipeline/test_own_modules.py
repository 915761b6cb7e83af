"""Files in the current folder run only if the user names them: `--model package.module:name`."""

import os
import sys

import making
import pytest
from commands import start
from making import TINY

from saltern.pipeline.naming import import_object

HOSTILE = ("pandas", "captum", "sitecustomize", "timm", "PIL", "typer")


def test_a_named_module_is_found_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_thing.py").write_text("value = 7\n")
    (tmp_path / "tomllib.py").write_text("value = 8\n")
    assert import_object("own_thing:value") == 7
    assert sys.path[-1] == str(tmp_path)
    assert not hasattr(import_object("tomllib:loads"), "value")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [("--engine", "local"), ("--engine", "ray", "--workers", "1")])
def test_files_named_like_packages_do_not_run(engine, tmp_path):
    making.write_shard(tmp_path / "in" / "a.tar", 3)
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    (tmp_path / "own_net.py").write_text("from making import tiny\n")
    words = ["extract", "in", "--out", "run", *TINY, "--method", "grad-cam", *engine]
    words[words.index("making:tiny")] = "own_net:tiny"
    ended = start(*words, cwd=tmp_path, PATH=os.environ["PATH"])
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "ran").exists()
