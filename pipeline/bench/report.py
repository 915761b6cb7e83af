"""The report of a bench: JSON with every round, and a Markdown table below a line about the machine."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from saltern import __version__
from saltern.pipeline.machine import cores


def describe_machine() -> dict[str, Any]:
    """Return the machine, the versions and the load that other processes put on it."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": list(os.getloadavg()),
        "versions": {"saltern": __version__}
        | {name: _version(name) for name in ("torch", "torchvision", "ray", "pyarrow", "pillow")},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass
class Report:
    """A report that is written again after each entry, so that an interrupted bench keeps what it has."""

    path: Path  # without suffix
    settings: dict[str, Any]
    title: str  # the model and the batch
    machine: dict[str, Any] = field(default_factory=describe_machine)
    parts: dict[str, Any] = field(default_factory=dict)  # of the JSON

    def follow(self, part: str, entries: Iterable[Any], table: Callable[[Sequence[Any]], str]) -> str:
        """Write each entry as it comes. Returns the Markdown."""
        done = self.parts[part] = list[Any]()
        text = ""
        for entry in entries:
            done.append(entry)
            text = table(done)
            self.write(text)
        return text

    def write(self, table: str) -> str:
        """Write both files. Returns the Markdown with its line about the machine."""
        machine = self.machine
        load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
        packages = ", ".join(f"{name} {machine['versions'][name] or 'absent'}" for name in ("torch", "ray"))
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; {packages}"
        text = f"{where}; {machine['date']}; load at the start {load}; {self.title}\n\n{table}\n"
        everything = {"machine": machine, "settings": self.settings, **self.parts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(everything, indent=1, default=lambda each: each.entry()))
        self.path.with_suffix(".md").write_text(text)
        return text
