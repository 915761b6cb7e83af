"""The choices of options, defined once: the command line shows them and the pipeline checks them."""

from enum import StrEnum

from saltern.schemas.errors import UserError


def check_choice(option: str, value: str, choices: type[StrEnum]) -> None:
    """Raise a UserError that names the choices if `value` is none of them."""
    if value not in tuple(choices):
        raise UserError(f"{option} {value!r} is none of {', '.join(choices)}")


# Execution
Engine = StrEnum("Engine", "auto local ray")
Device = StrEnum("Device", "auto cpu cuda")
Decode = StrEnum("Decode", "auto cpu gpu")
Precision = StrEnum("Precision", "fp32 tf32 bf16 fp16")

Compile = StrEnum("Compile", "auto on off")

# Stored maps
MapSize = StrEnum("MapSize", "native input")  # the method's own grid, or the network's input
MapDtype = StrEnum("MapDtype", "uint8 float16 float32")

# export
ExportFormat = StrEnum("ExportFormat", "wds npy png coco labelstudio")

# evaluate
TableFormat = StrEnum("TableFormat", "text markdown csv json")
Multiply = StrEnum("Multiply", "normalised pixels")  # what a map multiplies: the normalised image, or pixels in [0, 1]

# attack and visualize-class
StepRule = StrEnum("StepRule", "normalised sign")
PenaltyNorm = StrEnum("PenaltyNorm", "rms l2")
FirstImage = StrEnum("FirstImage", "zero noise")

# train-casm
ThinningName = StrEnum("ThinningName", {"F": "F", "L": "L", "FL": "FL", "L1000": "L1000", "L100": "L100"})
TrainingPreset = StrEnum("TrainingPreset", "steady published")
Score = StrEnum("Score", "entropy classification")
ClassifierLoss = StrEnum("ClassifierLoss", "sequential sum")
BatchNorm = StrEnum("BatchNorm", "train eval")
PoolDraw = StrEnum("PoolDraw", {"shared": "shared", "per_rank": "per-rank"})
TrainingPrecision = StrEnum("TrainingPrecision", "fp32 tf32 bf16")

# train-localizer
LabelKind = StrEnum("LabelKind", "maps masks boxes")
TrunkKind = StrEnum("TrunkKind", "frozen tuned")
