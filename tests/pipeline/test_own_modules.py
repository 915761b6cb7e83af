"""Files in the current folder run only if the user names them (tests/test_package.py has whole commands)."""

import sys

from saltern.pipeline.naming import import_object


def test_a_named_module_is_found_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_thing.py").write_text("value = 7\n")
    (tmp_path / "tomllib.py").write_text("value = 8\n")
    assert import_object("own_thing:value") == 7
    assert sys.path[-1] == str(tmp_path)
    assert not hasattr(import_object("tomllib:loads"), "value")
