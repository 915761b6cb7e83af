"""`saltern bench extract`: all its figures."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from saltern.pipeline.bench import footprint, rates
from saltern.pipeline.bench.engines import engines
from saltern.pipeline.bench.figures import Figure
from saltern.pipeline.bench.workload import Settings, Work, make_shards

_SHARDS = 4


def measure(settings: Settings, connect: Callable[[], object]) -> list[Figure]:
    """Everything, the quiet parts first; takes minutes.

    Args:
        settings: what to measure on; without shards, some are made.
        connect: joins or starts a Ray cluster with 2 CPUs; raises ImportError or UserError where there is none.
    """
    found: list[Figure] = []
    with _with_shards(settings) as settings:
        work = Work.of(settings.shards)
        parts: dict[str, Callable[[], list[Figure]]] = {
            "end to end, model-bound": lambda: rates.model_bound(settings, work),
            "end to end, decode-bound": lambda: rates.decode_bound(settings, work),
            "bytes stored": lambda: [rates.stored(settings, work)],
            "memory": lambda: [footprint.memory(settings)],
            "resume": lambda: footprint.resume(settings),
            "driver loop": lambda: [footprint.driver_loop(settings)],
            "start": lambda: [footprint.start(settings)],
            "engines": lambda: engines(settings, work, connect),  # the last, as Ray's daemons stay
        }
        for number, (name, part) in enumerate(parts.items(), 1):
            print(f"{number}/{len(parts)} {name}", file=sys.stderr, flush=True)
            found += part()
    return found


@contextmanager
def _with_shards(settings: Settings) -> Iterator[Settings]:
    if settings.shards:
        yield settings
        return
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        made = Path(folder, "shards")
        make_shards(made, _SHARDS, max(settings.stored_images // _SHARDS, 8 * settings.batch))
        yield replace(settings, shards=[str(made)], made=True)
