"""The options that several commands share, grouped by the panel of the help that shows them."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from saltern.jobs.config import convert, parse_options, read_config, to_classes, to_lambda, to_rgb
from saltern.schemas import choices
from saltern.schemas.errors import printable
from saltern.schemas.sizes import to_side

_RGB = convert(to_rgb, "three numbers, as 0.485,0.456,0.406")


def _option(panel: str, text: str, *names: str, **rules: Any) -> Any:
    """Declare an option: its panel, its help text, and its names if they differ from the parameter's."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **rules)


def with_checkpoint(options: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """Return a method's options and, if it is given, the checkpoint, which is one of them."""
    return options if checkpoint is None else {**options, "checkpoint": checkpoint}


def say(line: object, err: bool = False) -> None:
    """Print a line, with control characters of names and errors escaped, on stdout or stderr."""
    typer.echo(printable(str(line)), err=err)


# --- Input

inputs = partial(_option, "Input")

Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS...",
        help="Paths or s3:// and gs:// URLs of WebDataset tars: braces, globs, a folder or @list.txt.",
        show_default=False,
    ),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of a run.", show_default=False)]
RunFolders = Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders or URLs of runs.", show_default=False)]
Limit = Annotated[int | None, inputs("Use only the first N samples.", min=1)]
ImageMember = Annotated[
    str | None,
    inputs("Extension of the member with the image, such as image.jpg; default: the usual ones.", metavar="EXT"),
]
LabelMember = Annotated[
    str | None,
    inputs("Extension of the member with the class, or json:KEY; default: cls.", metavar="EXT|json:KEY"),
]
Resize = Annotated[int | None, inputs("Shorter side before the crop, in pixels; default: the weights'.", min=1)]
Crop = Annotated[
    str | None,
    inputs(
        "Side of the network's input, in pixels, or height and width; default: the weights'.",
        metavar="N|HxW",
        callback=convert(to_side, "a number of pixels, or height x width, as 224 or 224x448"),
    ),
]
Squash = Annotated[
    bool | None,
    inputs("Resize whole images to the crop's size, without cropping; default: the weights'.", "--squash/--no-squash"),
]
Mean = Annotated[
    str | None,
    inputs("Mean of RGB in 0..1, to normalise by; default: the weights'.", metavar="R,G,B", callback=_RGB),
]
Std = Annotated[
    str | None, inputs("Standard deviation of RGB in 0..1; default: the weights'.", metavar="R,G,B", callback=_RGB)
]
Classes = Annotated[
    str | None,
    inputs(
        "Numbers of the classes to use; default: all.",
        metavar="FILE|A,B,...",
        callback=convert(to_classes, "a list of numbers or a file of them"),
    ),
]
Side = Annotated[int | None, inputs("Side of the network's input, in pixels; default: the weights'.", min=1)]
MinCrop = Annotated[float, inputs("Smallest share of an image that a random crop covers.")]
Val = Annotated[
    list[str], inputs("Shards with boxes to validate on; repeatable.", metavar="SHARDS", show_default=False)
]
MoreShards = Annotated[list[str] | None, typer.Argument(metavar="SHARDS...", hidden=True)]  # a glob after --shards

# --- Model and method

model = partial(_option, "Model and method")

Model = Annotated[
    str,
    model(
        "Name from `saltern models`, timm:NAME, open_clip:NAME, hf:NAME or package.module:factory.",
        metavar="NAME",
        show_default=False,
    ),
]
Prompts = Annotated[
    str | None,
    model(
        "Texts that are the classes of a model that compares images with texts, or a file; default: the dataset's "
        "class names.",
        metavar="FILE|TEXT,...",
    ),
]
Templates = Annotated[
    list[str] | None,
    model(
        "Text with {} for a prompt, or a file of them; repeatable, and the embeddings are averaged; default: the "
        "prompts as they are, class names in 'a photo of a {}.'.",
        "--template",
        metavar="TEXT|FILE",
    ),
]
Weights = Annotated[str, model("DEFAULT, none (random weights), the name of weights, or a file.", metavar="NAME|FILE")]
Method = Annotated[str, model("Name from `saltern methods`, captum:NAME or package.module:Class.", metavar="NAME")]
Methods = Annotated[
    str,
    model(
        "Name from `saltern methods`, captum:NAME or package.module:Class; several with commas between them write "
        "one run each, DIR/NAME.",
        "--method",
        metavar="NAME,...",
    ),
]
Target = Annotated[
    str,
    model(
        "Class to explain: label, top1, top:N, class:ID or prompt:NAME; finer:K compares it with K similar ones "
        "(docs/methods.md)."
    ),
]
Labels = Annotated[
    str,
    model(
        "What `cls` holds: auto compares class names; as-is: the model's numbers; or a JSON file from the dataset's "
        "classes to the model's.",
        metavar="auto|as-is|FILE",
    ),
]
Layer = Annotated[
    str | None, model("The method's target layer by dotted name; default: the last stage.", metavar="NAME")
]
Checkpoint = Annotated[
    str | None, model("Folder of `saltern train-casm` or `train-localizer`, for that method.", metavar="DIR")
]
Options = Annotated[
    list[str] | None,
    model(
        "Option of the method, or METHOD:KEY=VALUE of one of several; repeatable.",
        "--option",
        "-O",
        metavar="KEY=VALUE",
        callback=parse_options,
    ),
]
Precision = Annotated[
    choices.Precision, model("Arithmetic of the passes; tf32 rounds inside a GPU only; bf16 and fp16: autocast.")
]
Deterministic = Annotated[
    bool | None,
    model(
        "Use operations that repeat to the bit on a GPU, and refuse a method that has none; default: yes.",
        "--deterministic/--no-deterministic",
    ),
]
Compile = Annotated[
    choices.Compile,
    model("Compile what a method runs without gradients; auto: on a GPU, for runs long enough to earn the start."),
]
Seed = Annotated[int, model("Seed of random weights and of everything else that is random.")]

# --- Output

output = partial(_option, "Output")

Out = Annotated[str, output("Folder or URL for the results.", metavar="DIR", show_default=False)]
OutFolder = Annotated[Path, output("Folder for the results.", metavar="DIR")]
Metrics = Annotated[
    list[str] | None,
    output(
        "Metrics, or families of them, as `saltern metrics` lists them; default: those without forward passes.",
        "--metric",
        metavar="le,om,f1",
    ),
]
Discretize = Annotated[
    str | None,
    output("Rule that makes masks: mean:1, otsu, quantile:.9, ...; default: the method's.", metavar="RULE"),
]
MapSize = Annotated[choices.MapSize, output("Grid of stored maps: the method's own, or the network's input.")]
MapDtype = Annotated[choices.MapDtype | None, output("Dtype of stored maps; default: the method's.")]
NoMap = Annotated[bool, output("Store masks and boxes only.", "--no-map")]
Overwrite = Annotated[bool, output("Remove the run in the folder first.", "--overwrite")]
AsJson = Annotated[bool, output("Print JSON instead of text.", "--json")]

# --- Execution

execution = partial(_option, "Execution")

Engine = Annotated[choices.Engine, execution("local works in this process, ray in actors; auto decides.")]
Address = Annotated[
    str | None,
    execution("Ray cluster to join; default: $RAY_ADDRESS, or a new one on this machine.", metavar="HOST:PORT"),
]
Workers = Annotated[int | None, execution("Number of Ray actors; default: one for each GPU.", min=1)]
TrainingWorkers = Annotated[
    int, execution("Data-parallel workers on Ray; 1 trains in this process.", "--workers", min=1)
]
GpusPerWorker = Annotated[
    float | None, execution("GPUs of a worker, fractions allowed; default: 1, on a CPU 0.", min=0)
]
Device = Annotated[choices.Device, execution("Device that computes; auto takes a GPU if one is visible.")]
BatchSize = Annotated[int | None, execution("Images in a batch; default: 16 on a CPU, 128 on a GPU.", min=1)]
Decode = Annotated[
    choices.Decode, execution("Where JPEG files are decoded; auto: on the GPU that computes, if there is one.")
]
DecodeThreads = Annotated[
    int | None,
    execution(
        "Threads of each worker that decode images; default: its share of its machine's cores, at most 16.", min=1
    ),
]
ShardTimeout = Annotated[float | None, execution("Seconds that a shard may take.", "--shard-timeout", min=0)]
MaxFailedShards = Annotated[int | None, execution("Stop when more shards than this have failed.", min=0)]
RetryFailed = Annotated[
    bool, execution("Redo the shards that have samples with another status than ok.", "--retry-failed")
]
Config = Annotated[
    Path | None, execution("TOML file with these options as keys.", metavar="FILE", callback=read_config, is_eager=True)
]

# --- Synthesis: attack and visualize-class

steps = partial(_option, "Optimization")

Steps = Annotated[int, steps("Gradient steps for each image.", min=1)]

# --- Training: train-casm, unseen-classes and train-localizer

training = partial(_option, "Training")

Thinning = Annotated[
    choices.ThinningName,
    training("Classifiers that judge masks: the fixed one (F), the learning one (L) or a pool of past ones."),
]
Lambda = Annotated[
    str | None,
    training(
        "Weight of the penalty on a mask's size; auto steers to --mask-area; default: that of --preset.",
        "--lambda",
        metavar="NUMBER|auto",
        callback=convert(to_lambda, "a number or auto"),
    ),
]
TrainingPreset = Annotated[
    choices.TrainingPreset,
    training("Defaults of the options below: those that keep every training alive, or the paper's.", "--preset"),
]
Epochs = Annotated[int, training("Epochs; learning rates fall to a tenth after each third.", min=1)]
StepsPerEpoch = Annotated[int | None, training("Steps of an epoch; default: a fifth of the data.", min=1)]
TrainingBatchSize = Annotated[int, training("Images of a step, over all workers.", "--batch-size", min=1)]
WeightDecay = Annotated[float, training("Weight decay of both.", min=0)]
Tensorboard = Annotated[
    bool, output("Also write all measurements to DIR/tensorboard, for TensorBoard.", "--tensorboard")
]
CheckpointEvery = Annotated[int | None, execution("Steps between checkpoints; default: an epoch.", min=1)]
Resume = Annotated[bool, execution("Resume from the newest checkpoint in DIR.", "--resume")]
TrainingPrecision = Annotated[
    choices.TrainingPrecision,
    training("Arithmetic of the passes; tf32 rounds inside a GPU only; bf16: autocast.", "--precision"),
]
