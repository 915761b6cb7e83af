"""A run of `extract` in this process, on the toy network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest

REQUEST = ExtractRequest(
    shards=[], model="making:tiny", method="grad-cam", layer="body", resize=40, crop=32, batch_size=4
)


def extract(shards: Path | str, out: Path, settings: dict[str, Any] | None = None, **wishes: Any) -> int:
    request = replace(REQUEST, shards=[str(shards)], **{"torch_threads": 1, **wishes})
    return conduct(extraction(request), RunOptions(str(out), device="cpu", engine="local", **(settings or {}))).code
