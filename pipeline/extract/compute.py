"""The thread that owns the device: it builds the tasks of a processor and runs batches through them."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from saltern.pipeline.device import arithmetic, faults, out_of_memory
from saltern.pipeline.extract.task import Pending, Task
from saltern.schemas.config import MethodConfig

Parts = list[Pending | None]  # results of each part of a batch; None: one image that does not fit in memory
Running = Future[dict[str, Parts]]


class Computer:
    """Tasks by the name of their run, and the thread that calls them, so that bits do not depend on what else runs.

    Args:
        configs: of the runs; they differ in their methods only.
        device: of the tasks.
        build: builds the tasks.

    Raises:
        UserError: the model, its weights or a method are not available here, or the weights are not the runs'.
    """

    def __init__(
        self, configs: Mapping[str, MethodConfig], device: torch.device, build: Callable[[], Mapping[str, Task]]
    ) -> None:
        self._configs, self._device = configs, device
        self._config = next(iter(configs.values()))
        self.chunk = dict.fromkeys(
            configs, self._config.batch_size
        )  # images of a call, by run; halved by lack of memory
        self._thread = ThreadPoolExecutor(1, "saltern-device", self._begin)
        self.tasks = self._thread.submit(self._build, build).result()
        teams: dict[object, list[str]] = {}
        for name, task in self.tasks.items():
            teams.setdefault((name,) if task.team is None else (None, task.team), []).append(name)
        self._teams = list(teams.values())

    def submit(self, names: Sequence[str], *inputs: Tensor) -> Running:
        """Start the tasks of these runs on one batch.

        Args:
            names: of the runs.
            inputs: pixels, labels and seeds, as a task takes them.
        """
        if self._device.type == "cuda":
            inputs = tuple(tensor if tensor.is_cuda else tensor.pin_memory() for tensor in inputs)
        return self._thread.submit(self._run, names, *inputs)

    def close(self) -> None:
        """Release hooks and device memory, and end the thread."""
        self._thread.submit(self._release).result()
        self._thread.shutdown()

    def _begin(self) -> None:
        """Set what torch keeps for each calling thread, in the one that computes.

        Its stream is not the default one, which waits for other streams, such as nvJPEG's, and they for it.
        """
        torch.set_num_threads(self._config.torch_threads)
        if self._device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _build(self, build: Callable[[], Mapping[str, Task]]) -> dict[str, Task]:
        with self._arithmetic(list(self._configs)), faults():
            return dict(build())

    def _arithmetic(self, names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        methods = ", ".join(dict.fromkeys(self._configs[name].method for name in names))
        config = self._config
        return arithmetic(config.precision, deterministic=config.deterministic, what=f"{methods} of {config.model}")

    def _release(self) -> None:
        for task in self.tasks.values():
            task.close()
        self.tasks = {}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, names: Sequence[str], *inputs: Tensor) -> dict[str, Parts]:
        self._take(inputs)
        found: dict[str, Parts] = {}
        for team in self._teams:
            if members := [name for name in team if name in names]:
                found |= self._team(members, inputs)
        return found

    def _take(self, inputs: Sequence[Tensor]) -> None:
        """Wait on the device for inputs that the default stream joined, and keep their memory until they are used."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(torch.cuda.default_stream(self._device))
            for tensor in inputs:
                if tensor.is_cuda:
                    tensor.record_stream(stream)

    def _team(self, names: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, Parts]:
        """Run the tasks of a team. If memory runs out, halve their batches for the rest of this process."""
        while True:
            chunk = min(self.chunk[name] for name in names)
            try:
                parts = zip(*(torch.split(tensor, chunk) for tensor in inputs), strict=True)
                with self._arithmetic(names):
                    results = [self._part(names, part, chunk) for part in parts]
                return {name: [result[at] for result in results] for at, name in enumerate(names)}
            except (RuntimeError, MemoryError) as error:
                if chunk == 1 or not out_of_memory(error):
                    raise
                self.chunk |= dict.fromkeys(names, chunk // 2)
            torch.cuda.empty_cache()

    def _part(self, names: Sequence[str], part: Sequence[Tensor], chunk: int) -> Sequence[Pending | None]:
        task, *others = (self.tasks[name] for name in names)
        try:
            return task.together(others, *part) if others else [task(*part)]
        except (RuntimeError, MemoryError) as error:
            if chunk > 1 or not out_of_memory(error, alone=True):
                raise
            torch.cuda.empty_cache()
            return [None] * len(names)
