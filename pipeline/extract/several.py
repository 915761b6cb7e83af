"""A request that names several methods: one request for each, and their runs planned together."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from saltern.pipeline.extract.request import ExtractRequest, find_inputs, resolve
from saltern.pipeline.methods import Method, find
from saltern.pipeline.methods.options import check_names
from saltern.schemas.config import ExtractConfig
from saltern.schemas.errors import UserError
from saltern.schemas.run import Run

# Runs that are made together have these in common, as they share decoded batches and the thread that computes.
_COMMON = ("batch_size", "torch_threads", "deterministic", "decoder", "labels")


def each_method(request: ExtractRequest) -> dict[str, ExtractRequest]:
    """Return the request of each method by its name. Options go to the methods that have them.

    An option is named `key`, or `METHOD:key` for one of the methods; a layer goes to the methods that have layers.

    Raises:
        UserError: a method is unknown or named twice, or no method has an option or a layer.
    """
    names = [name.strip() for name in request.method.split(",")]
    if "" in names:
        raise UserError(f"--method {request.method}: a name is empty; give names with one comma between them")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"--method {request.method}: {twice[0]} is named twice")
    kinds = {name: find(name) for name in names}
    layered = [name for name, kind in kinds.items() if kind.layered] if len(names) > 1 else names
    if request.layer and not layered:
        raise UserError(f"none of {', '.join(names)} has a target layer; leave out --layer {request.layer}")
    options = _options(request.options, kinds)
    return {
        name: replace(request, method=name, options=options[name], layer=request.layer if name in layered else None)
        for name in names
    }


def _options(given: Mapping[str, Any], kinds: Mapping[str, type[Method]]) -> dict[str, dict[str, Any]]:
    """Return the options of each method. Those that name their method take precedence."""
    found: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    known = {name: [spec.name for spec in kind.option_specs()] for name, kind in kinds.items()}
    every = list(dict.fromkeys(key for keys in known.values() for key in keys))
    for word, value in sorted(given.items(), key=lambda item: ":" in item[0]):
        method, colon, key = word.rpartition(":")
        if colon:
            if method not in kinds:
                raise UserError(f"option {word}: {method!r} is none of the methods {', '.join(kinds)}")
            found[method][key] = value
        elif len(kinds) == 1:
            found[next(iter(kinds))][key] = value  # the method checks it
        else:
            check_names([key], every, ", ".join(kinds))
            for name in kinds:
                found[name] |= {key: value} if key in known[name] else {}
    return found


def resolve_each(
    requests: Mapping[str, ExtractRequest], existing: Mapping[str, Run | None], device: str, workers: int
) -> tuple[dict[str, Run], list[str]]:
    """Return the run of each request, and hints for the user. Shards and classifier are loaded once.

    Args:
        requests: by method.
        existing: the runs in the folders, by method.
        device, workers: as for `resolve`.

    Raises:
        UserError: as `resolve`, or existing runs cannot be made together.
    """
    sibling = next((run for run in existing.values() if run is not None), None)
    inputs = find_inputs(next(iter(requests.values())), sibling)
    runs: dict[str, Run] = {}
    hints: dict[str, list[str]] = {}  # methods by line
    for name, request in requests.items():
        runs[name], said = resolve(request, existing[name], device, workers, inputs=inputs, sibling=sibling)
        for line in said:
            hints.setdefault(line, []).append(name)
    _check_common(runs)
    return runs, [line if len(of) == len(runs) else f"{', '.join(of)}: {line}" for line, of in hints.items()]


def _check_common(runs: Mapping[str, Run]) -> None:
    """Check that runs share batches, threads and decoder. Those made by other commands may not."""
    first, *others = ((name, run.config_of(ExtractConfig)) for name, run in runs.items())
    for name, config in others:
        for key in _COMMON:
            values = getattr(first[1], key), getattr(config, key)
            if values[0] != values[1]:
                mine, theirs = (str(value)[:40] for value in values)
                raise UserError(
                    f"the run of {first[0]} has {key} {mine}, that of {name} {theirs}: they cannot be made together; "
                    "resume each by a command with one --method"
                )
