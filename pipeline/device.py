"""The device that computes: its arithmetic, and its faults."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from functools import cache

import torch

from saltern.schemas.errors import DeviceLostError, UserError

# Parts of messages of torch and of NVIDIA's libraries.
_FULL = re.compile(
    "out of memory|(can't|cannot) allocate memory|not enough memory|std::bad_alloc"
    # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "|(CUBLAS|CUDNN|CUSOLVER)_STATUS_[A-Z_]*ALLOC(ATION)?_FAILED"
)
# Given when a library finds no room for its workspace, and for other reasons too.
_PERHAPS_FULL = re.compile(
    "(CUBLAS|CUDNN)_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_SUPPORTED|[Uu]nable to find (an engine|a valid cuDNN)"
)
_LOST = re.compile(
    "CUDA( driver| unknown)? error|cudaError|CUBLAS_STATUS_|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
    "|CUSOLVER_STATUS_|NCCL|nvJPEG error|Triton Error|No CUDA GPUs|NVIDIA driver"
)
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
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):
            raise UserError(
                "this process used CUDA before, without what lets matrix products repeat: set the environment variable "
                "CUBLAS_WORKSPACE_CONFIG=:4096:8 before, or give --no-deterministic"
            ) from error
        operation, repeats_not, _ = str(error).partition(_UNREPEATABLE)
        if not repeats_not:
            raise
        raise UserError(
            f"{what} needs {operation.split()[-1]}, which does not repeat to the bit on this device; {fix}"
        ) from error
    finally:
        _set(*before)
        torch.set_num_threads(counted)


def memory_format(precision: str, device: torch.device) -> torch.memory_format:
    """Return the memory layout of models and images: channels_last where it is faster and fp32 is not asked for."""
    plain = precision == "fp32" or (precision == "tf32" and device.type == "cpu")  # where tf32 is fp32, bit for bit
    return torch.contiguous_format if plain else torch.channels_last


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


def out_of_memory(error: BaseException, *, alone: bool = False) -> bool:
    """Return whether an allocation failed, on a GPU or on the host.

    Args:
        alone: nothing smaller can be tried, so messages that have other causes too do not count.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return bool(_FULL.search(text) or (not alone and _PERHAPS_FULL.search(text)))


def device_lost(error: BaseException) -> bool:
    """Return whether the error leaves the device unusable for this process."""
    if not isinstance(error, RuntimeError) or out_of_memory(error, alone=True):
        return False
    return isinstance(error, torch.AcceleratorError) or bool(_LOST.search(str(error)))


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Raise DeviceLostError for a lost device and MemoryError if memory ran out, which are no faults of the code."""
    try:
        yield
    except RuntimeError as error:
        if device_lost(error):
            raise DeviceLostError(_first_line(error)) from error
        if out_of_memory(error, alone=True):
            raise MemoryError(_first_line(error)) from error
        raise


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
