"""saltern unseen-classes: measure masks on classes that were left out of the training."""

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect
from saltern.jobs.train_casm import hyperparameters_of
from saltern.schemas import choices


def unseen_classes(
    ctx: typer.Context,
    shards: opt.Shards,
    *,
    model: opt.Model,
    weights: opt.Weights = "DEFAULT",
    seed: opt.Seed = 0,
    labels: opt.Labels = "auto",
    classes: opt.Classes = None,
    side: opt.Side = None,
    min_crop: opt.MinCrop = 0.08,
    val: opt.Val,
    out: opt.OutFolder,
    as_json: opt.AsJson = False,
    preset: opt.TrainingPreset = choices.TrainingPreset.steady,
    thinning: opt.Thinning = choices.ThinningName.L,
    lam: opt.Lambda = None,
    epochs: opt.Epochs = 60,
    steps_per_epoch: opt.StepsPerEpoch = None,
    batch_size: opt.TrainingBatchSize = 128,
    precision: opt.TrainingPrecision = choices.TrainingPrecision.fp32,
    device: opt.Device = choices.Device.auto,
    workers: opt.TrainingWorkers = 1,
    gpus_per_worker: opt.GpusPerWorker = None,
    address: opt.Address = None,
) -> None:
    """Split the classes into A to F, train CASM on F, E+F, D-F, C-F and B-F, and print LE on every subset.

    To resume the experiment, repeat the command; the result is the same.
    """
    import json

    from saltern.pipeline.casm.training.train import TrainRequest
    from saltern.pipeline.casm.unseen.experiment import unseen_classes as experiment

    hyperparameters = hyperparameters_of(ctx, preset, thinning)
    try:
        result = experiment(collect(TrainRequest, ctx, hyperparameters=hyperparameters, val=()), val)
    except KeyboardInterrupt:
        typer.echo("finished parts are kept: repeat the same `saltern unseen-classes` command to resume", err=True)
        raise
    if as_json:
        typer.echo(json.dumps(result.summary(), indent=1))
    else:
        typer.echo(result.table())
        typer.echo(result.remarks())
