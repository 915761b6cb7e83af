"""Options are declared once, are shown in help and completion, and reach a config."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import typer
from commands import call
from typer.testing import CliRunner

from saltern.jobs.config import to_classes
from saltern.jobs.main import app
from saltern.pipeline.casm.algorithm.hyperparameters import PRESETS, Hyperparameters

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {
    **{name: command for name, command in GROUP.commands.items() if name != "bench"},
    **{f"bench {name}": command for name, command in GROUP.commands["bench"].commands.items()},
}
# Options whose meaning depends on the command.
DIFFERENT = {
    "--out": "a run's folder or URL; a local folder; the page of show",
    "--method": "one; in extract one or several",
    "--limit": "samples to read; rows to show",
    "--step-size": "a fraction of the pixel range in attack; a factor in visualize-class",
    "--lambda": "weight of the mask's size, or auto; weight of the squared norm in visualize-class",
    "--classes": "a list or file of numbers; ranges and all in visualize-class",
    "--workers": "Ray actors; data-parallel workers of a training; workers to plan for",
    "--batch-size": "images; classes in visualize-class; images of a training's step",
    "--precision": "of an extraction; of a training, which has no fp16",
    "--format": "of the table of evaluate; of the files of export",
    "--shards": "of the run that evaluate measures; to measure on in bench extract, which makes some by default",
    "--thinning": "one for a training; several to measure in bench casm",
    "--model": "must be given; in train-localizer the default is the run's",
    "--weights": "the default is DEFAULT; in train-localizer the run's",
    "--side": "the default is the weights'; in train-localizer the run's",
    "--val": "shards; a run in train-localizer",
    "--labels": "what `cls` holds; what a mask learns in train-localizer",
    "--epochs": "with rates in thirds; with a cosine in train-localizer",
    "--steps-per-epoch": "the default is a fifth of the data; all of it in train-localizer",
    "--address": "of a Ray cluster; of a cluster's dashboard in submit",
}


def signature(command: Any) -> dict[str, inspect.Parameter]:
    function = inspect.unwrap(command.callback)
    return {name: it for name, it in inspect.signature(function).parameters.items() if it.annotation != typer.Context}


def enums(command: Any) -> Iterator[type[Enum]]:
    """Yield the Enums that a command's options take their values from."""
    for parameter in signature(command).values():
        kind = get_args(parameter.annotation)[0]
        for candidate in get_args(kind) or (kind,):
            if isinstance(candidate, type) and issubclass(candidate, Enum):
                yield candidate


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_and_its_choices(name: str) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "240"}).stdout
    for parameter in COMMANDS[name].params:
        if not getattr(parameter, "hidden", False) and parameter.param_type_name == "option":
            assert max(parameter.opts, key=len) in shown
            assert parameter.help, parameter.name
    for kind in enums(COMMANDS[name]):
        assert "|".join(choice.value for choice in kind) in shown


def test_each_option_is_declared_once() -> None:
    declared: dict[str, set[int]] = defaultdict(set)
    for command in COMMANDS.values():
        names = {parameter.name: max(parameter.opts, key=len) for parameter in command.params}
        for name, parameter in signature(command).items():
            assert get_origin(parameter.annotation) is Annotated, name
            declared[names[name]].add(id(parameter.annotation.__metadata__[0]))
    doubled = {name for name, declarations in declared.items() if len(declarations) > 1}
    assert doubled == set(DIFFERENT)


def requests() -> dict[str, tuple[tuple[type, ...], set[str]]]:
    """Return the dataclasses that a command's parameters become, and the parameters that the command reads itself."""
    from saltern.pipeline.casm.training.train import TrainRequest
    from saltern.pipeline.engine.conduct import RunOptions
    from saltern.pipeline.extract.request import ExtractRequest
    from saltern.pipeline.localizer import plan as localizer
    from saltern.pipeline.localizer.hyperparameters import Hyperparameters as OfLocalizer
    from saltern.pipeline.synthesis.perturb import PGD
    from saltern.pipeline.synthesis.visualize import VisualizeRequest

    return {
        "extract": ((ExtractRequest, RunOptions), {"config", "checkpoint", "no_map"}),
        "attack": ((ExtractRequest, PGD, RunOptions), {"config", "guide", "save_images"}),
        "visualize-class": ((VisualizeRequest, RunOptions), {"batch_size"}),
        "plan": ((ExtractRequest,), {"as_json", "checkpoint", "device", "no_map", "workers"}),
        "train-casm": ((TrainRequest, Hyperparameters), {"config", "preset", "lam"}),
        "unseen-classes": ((TrainRequest, Hyperparameters), {"as_json", "preset", "lam"}),
        "train-localizer": ((localizer.TrainRequest, OfLocalizer), {"config"}),
    }


def test_every_option_is_a_field_with_the_same_default() -> None:
    """Otherwise a renamed field would silently lose its option."""
    for name, (kinds, own) in requests().items():
        known = {field.name: field.default for kind in kinds for field in fields(kind)}
        for default in filter(is_dataclass, tuple(known.values())):
            known |= asdict(default)
        if Hyperparameters in kinds:
            known |= PRESETS["steady"]
        options = signature(COMMANDS[name])
        assert set(options) - set(known) == own - set(known), name
        for option, parameter in options.items():
            default = known.get(option, MISSING)
            text = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
            if default in (MISSING, ()) or option in own | {"thinning", "model", "method"}:
                continue
            assert text == default, (name, option)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("saltern ", {"extract", "train-casm", "bench"}),
        ("saltern extract --en", {"--engine"}),
        ("saltern extract --engine ", {"auto", "local", "ray"}),
        ("saltern extract --map-dtype f", {"float16", "float32"}),
        ("saltern train-casm --thinning L1", {"L1000", "L100"}),
        ("saltern attack --rule ", {"normalised", "sign"}),
    ],
)
def test_completion_lists_commands_options_and_choices(
    monkeypatch: pytest.MonkeyPatch, line: str, expected: set[str]
) -> None:
    words = line.split(" ")
    monkeypatch.setenv("_SALTERN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    listed = set(call().stdout.split())
    assert expected <= listed
    if "--" in line and not line.endswith("-"):
        assert listed == expected


def test_a_slip_among_class_numbers_is_no_other_class(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3, 1_4\n")
    with pytest.raises(ValueError, match="1-4"):
        to_classes(str(tmp_path / "classes.txt"))
