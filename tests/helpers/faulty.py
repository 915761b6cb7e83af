"""Methods, given as `faulty:Class`, that raise the errors of a GPU, as files in a folder say."""

from pathlib import Path
from typing import Annotated

import torch
from odd_methods import Mean
from torch import Tensor

FULL = {  # messages of an allocation that failed
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "driver": torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cublas handle": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cusolver": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "cudnn engine": RuntimeError("FIND was unable to find an engine to execute this computation"),
    "cudnn plan": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError("Unable to allocate 2.00 GiB"),
}
LOST = {  # messages of a device that is gone
    "accelerator": torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for ..."),
    "unknown": torch.AcceleratorError("a message that no list has"),
    "assertion": RuntimeError("CUDA error: device-side assert triggered"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    "driver": RuntimeError("CUDA driver error: unknown error"),
    "nccl": RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error"),
    "gone": RuntimeError("No CUDA GPUs are available"),
}


class Faulty(Mean):
    """Base of the methods that raise the error that the file `which` names."""

    folder: Annotated[str, "Of the files."] = ""

    def read(self, name: str) -> str:
        return Path(self.folder, name).read_text()


class Full(Faulty):
    """Method that runs out of memory with more than three images."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        if len(map_BHW) > 3:
            raise FULL[self.read("which")]
        return map_BHW


class Lost(Faulty):
    """Method that loses its device at a black image, as often as the file `left` says."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        if bool((map_BHW.amax((1, 2)) < -1).any()) and (left := int(self.read("left"))):
            Path(self.folder, "left").write_text(str(left - 1))
            raise LOST[self.read("which")]
        return map_BHW
