"""saltern train-localizer: train a mask head on a run's pseudo-labels."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect
from saltern.schemas import choices


def train_localizer(
    ctx: typer.Context,
    run: opt.RunFolder,
    *,
    shards: Annotated[
        list[str],
        opt.inputs(
            "Where the run's tars are now, if they were moved; repeatable.", metavar="SHARDS", show_default=False
        ),
    ] = [],  # noqa: B006 - typer's way
    val: Annotated[
        str | None,
        opt.inputs("A run of the same method over held-out shards with boxes, to validate on.", metavar="RUN"),
    ] = None,
    side: Annotated[
        int | None, opt.inputs("Side of the network's input, in pixels; default: the run's.", min=1)
    ] = None,
    min_crop: opt.MinCrop = 0.5,
    model: Annotated[
        str | None, opt.model("Trunk: a name as for `extract`; default: the run's model.", metavar="NAME")
    ] = None,
    weights: Annotated[
        str | None, opt.model("Of --model: DEFAULT, none, the name of weights, or a file.", metavar="NAME|FILE")
    ] = None,
    seed: opt.Seed = 0,
    out: opt.OutFolder,
    labels: Annotated[
        choices.LabelKind, opt.training("What the mask learns: the run's maps, masks, or filled boxes.")
    ] = choices.LabelKind.masks,
    trunk: Annotated[
        choices.TrunkKind, opt.training("Keep the classifier's trunk as it is, or train it too.")
    ] = choices.TrunkKind.frozen,
    smoothing: Annotated[
        float, opt.training("How far labels are pulled towards their mean, cell by cell.", min=0)
    ] = 0.5,
    epochs: Annotated[int, opt.training("Passes over the run's samples; rates fall by a cosine.", min=1)] = 10,
    steps_per_epoch: Annotated[int | None, opt.training("Steps of an epoch; default: the whole data.", min=1)] = None,
    batch_size: opt.TrainingBatchSize = 64,
    lr: Annotated[float, opt.training("Learning rate of the head's AdamW.", min=0)] = 1e-3,
    lr_trunk: Annotated[float, opt.training("Learning rate of a tuned trunk.", min=0)] = 1e-4,
    weight_decay: opt.WeightDecay = 1e-4,
    precision: opt.TrainingPrecision = choices.TrainingPrecision.fp32,
    device: opt.Device = choices.Device.auto,
    workers: opt.TrainingWorkers = 1,
    gpus_per_worker: opt.GpusPerWorker = None,
    address: opt.Address = None,
    decode_threads: opt.DecodeThreads = None,
    tensorboard: opt.Tensorboard = False,
    checkpoint_every: opt.CheckpointEvery = None,
    resume: opt.Resume = False,
    config: opt.Config = None,
) -> None:
    """Train a localizer on a run's maps, masks or boxes, for `saltern extract --method localizer --checkpoint DIR`.

    With --val, measures LE and F1 after each epoch, and compares them with the boxes that it learnt from. A training
    that was stopped at any moment and is resumed with --resume ends with the same weights, bit for bit.
    """
    from saltern.pipeline.localizer.hyperparameters import Hyperparameters
    from saltern.pipeline.localizer.train import TrainRequest, train

    train(collect(TrainRequest, ctx, hyperparameters=collect(Hyperparameters, ctx)))
    typer.echo(f"{out} is done; next: saltern extract ... --method localizer --checkpoint {out}")
