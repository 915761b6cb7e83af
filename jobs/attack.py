"""saltern attack: make adversarial images, plain and guided by a saliency map."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, convert, drive, to_number
from saltern.schemas import choices

_NUMBER = convert(to_number, "a number, as 12/255 or 0.05")


def attack(
    ctx: typer.Context,
    shards: opt.Shards,
    *,
    model: opt.Model,
    guide: Annotated[
        str, opt.model("Class-specific saliency method whose map guides the attack.", metavar="NAME")
    ] = "cameras",
    weights: opt.Weights = "DEFAULT",
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    layer: opt.Layer = None,
    options: opt.Options = None,
    deterministic: opt.Deterministic = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = 80,
    step_size: Annotated[
        str,
        opt.steps(
            "Change of a pixel in one step (normalised: root mean square); pixels are in 0..1.",
            callback=_NUMBER,
            metavar="NUMBER",
        ),
    ] = "1.5/255",
    rule: Annotated[
        choices.StepRule, opt.steps("One step: the gradient, normalised for each image, or its sign.")
    ] = choices.StepRule.normalised,
    epsilon: Annotated[
        str, opt.steps("Largest change of a pixel; pixels are in 0..1.", callback=_NUMBER, metavar="NUMBER")
    ] = "12/255",
    beta: Annotated[float, opt.steps("Weight of the penalty on the perturbation outside the map.", min=0)] = 50.0,
    norm: Annotated[
        choices.PenaltyNorm, opt.steps("Norm in that penalty: root of the mean square, or of the sum of squares.")
    ] = choices.PenaltyNorm.rms,
    recompute: Annotated[int, opt.steps("Recompute the map every N steps; 0: never.", min=0)] = 0,
    image_member: opt.ImageMember = None,
    label_member: opt.LabelMember = None,
    limit: opt.Limit = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    out: opt.Out,
    save_images: Annotated[
        bool, opt.output("Store clean and perturbed images, and attack.png.", "--save-images/--no-save-images")
    ] = True,
    overwrite: opt.Overwrite = False,
    engine: opt.Engine = choices.Engine.auto,
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    device: opt.Device = choices.Device.auto,
    batch_size: opt.BatchSize = None,
    decode: opt.Decode = choices.Decode.auto,
    decode_threads: opt.DecodeThreads = None,
    retry_failed: opt.RetryFailed = False,
    shard_timeout_s: opt.ShardTimeout = None,
    max_failed_shards: opt.MaxFailedShards = None,
    config: opt.Config = None,
) -> None:
    """Perturb images until the model sees their least likely class, by plain PGD and by PGD guided by a map.

    Prints the mean fooling confidence, and how much smaller the guided perturbation is. To resume a run, repeat the
    command.
    """
    from saltern.pipeline.synthesis.attack import AttackRequest, attacking
    from saltern.schemas.config import PGD

    drive(ctx, attacking(collect(AttackRequest, ctx, method=guide, pgd=collect(PGD, ctx))))
