"""Whether a run compiles what its method runs without gradients."""

from typing import Protocol

from saltern.pipeline.extract.tryout import one_line
from saltern.pipeline.methods import Method
from saltern.pipeline.models.probe import probe
from saltern.schemas.config import ExtractConfig
from saltern.schemas.errors import UserError
from saltern.schemas.run import Run

# Compiling takes about 20 s and then saves about 40 us an image (ResNet-50, H100).
EARNS = 500_000  # images of a worker
_IMAGE = 110_000  # bytes of a photograph of ImageNet


class _Request(Protocol):
    @property
    def compile(self) -> str: ...


def choose_compile(request: _Request, existing: Run | None, method: Method, size: int, device: str) -> tuple[bool, str]:
    """Return whether a run compiles, and a line for the user that says why.

    Args:
        request: with auto, on or off.
        existing: the run in the folder; auto keeps what it does.
        method: of the run, on the CPU.
        size: bytes of the shards of one worker.
        device: cpu | cuda

    Raises:
        UserError: compilation was asked for, and the method has nothing to compile.
    """
    if request.compile == "off":
        return False, "compile off (as requested)"
    if request.compile == "auto":
        if existing is not None and isinstance(existing.config, ExtractConfig):
            made = existing.config.compile
            return made, f"compile {'on' if made else 'off'} (as the run was made)"
        if device != "cuda":
            return False, "compile off (auto compiles on a GPU only)"
        if size < EARNS * _IMAGE:
            images = f"about {size // _IMAGE:,} images a worker, and its start is earned back after {EARNS:,}"
            return False, f"compile off ({images})"
    with one_line(method.model, probe(method.model, method.input_side)):
        parts = method.trunk()
    if parts:
        return True, f"compile on ({len(parts)} parts of the model run without gradients)"
    nothing = f"{method.title()} runs no large part of {type(method.model).__name__} without gradients"
    if request.compile == "on":
        raise UserError(f"--compile on: {nothing}; leave it out")
    return False, f"compile off ({nothing})"
