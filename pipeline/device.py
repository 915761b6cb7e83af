"""The device that computes: its arithmetic."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache

import torch

from saltern.schemas.errors import UserError

_UNREPEATABLE = " does not have a deterministic implementation"  # in torch's messages, after the operation's name


@contextlib.contextmanager
def arithmetic(
    precision: str = "fp32",
    *,
    deterministic: bool = True,
    threads: int | None = None,
    what: str = "this job",
    fix: str = "give --no-deterministic, or another method",
) -> Iterator[None]:
    """Set the arithmetic of this process, and restore torch's settings afterwards.

    Args:
        precision: fp32 computes in float32 everywhere; tf32 lets a GPU round the inputs of convolutions and matrix
            products to 10 bits. With bf16 and fp16, convolutions that stay in float32 use TF32, which is finer.
        deterministic: use operations that repeat to the bit, and refuse those that do not.
        threads: torch's threads, which decide the order of sums on a CPU; None keeps their number.
        what: is computed, and the fix if an operation is refused, both for the message.

    Raises:
        UserError: an operation has no deterministic version on this device.
    """
    before, counted = _settings(), torch.get_num_threads()
    # CUDA reads this when it starts; without it, matrix products do not repeat.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _set(precision == "tf32", precision != "fp32", 2 if deterministic else 0, deterministic, False, False)
    torch.set_num_threads(threads or counted)
    try:
        yield
    except RuntimeError as error:
        operation, repeats_not, _ = str(error).partition(_UNREPEATABLE)
        if not repeats_not:
            raise
        raise UserError(
            f"{what} needs {operation.split()[-1]}, which does not repeat to the bit on this device; {fix}"
        ) from error
    finally:
        _set(*before)
        torch.set_num_threads(counted)


def _settings() -> tuple[bool, bool, int, bool, bool, bool]:
    _silence()
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_deterministic_debug_mode(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def _set(products: bool, convolutions: bool, debug: int, repeats: bool, tuned: bool, filled: bool) -> None:
    # The newer `fp32_precision` leaves these flags behind, and torch.compile then refuses the mixture (pytorch#166387).
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_deterministic_debug_mode(debug)  # use_deterministic_algorithms would import torch.compile, for seconds
    torch.backends.cudnn.deterministic = repeats
    torch.backends.cudnn.benchmark = tuned
    # Filling costs time, and no code reads that memory.
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@cache
def _silence() -> None:
    """Trigger the warning about these flags that torch 2.9 and later give once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
