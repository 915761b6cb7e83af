"""saltern train-casm: train a mask network that does not depend on a single classifier."""

from typing import TYPE_CHECKING, Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, given
from saltern.schemas import choices
from saltern.schemas.errors import UserError

if TYPE_CHECKING:
    from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters

MASK_AREA = 0.5


def hyperparameters_of(
    ctx: typer.Context, preset: choices.TrainingPreset, thinning: choices.ThinningName
) -> "Hyperparameters":
    """Return the preset's hyperparameters, replaced by those that the user gave."""
    from saltern.pipeline.casm.algorithm.hyperparameters import PRESETS, Hyperparameters
    from saltern.pipeline.casm.algorithm.thinning import thinning_named

    chosen = {**PRESETS[preset.value], **given(Hyperparameters, ctx), "thinning": thinning_named(thinning.value)}
    return Hyperparameters(**chosen)


def train_casm(
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
    val: opt.Val = None,
    out: opt.OutFolder,
    preset: opt.TrainingPreset = choices.TrainingPreset.steady,
    thinning: opt.Thinning = choices.ThinningName.L100,
    pool_size: Annotated[int, opt.training("Past classifiers in the pool, at most.", min=1)] = 30,
    pool_half: Annotated[bool, opt.training("Keep the pool's weights in 16 bits.", "--pool-half")] = False,
    pool_draw: Annotated[
        choices.PoolDraw, opt.training("Draw one past classifier for all workers, or one for each.")
    ] = choices.PoolDraw.shared,
    score: Annotated[
        choices.Score, opt.training("Score of the masked image: its entropy, or its cross-entropy.")
    ] = choices.Score.classification,
    lam: opt.Lambda = None,
    mask_area: Annotated[float, opt.training("Mean mask that --lambda auto steers to.")] = MASK_AREA,
    tv: Annotated[float, opt.training("Weight of the masks' total variation.", min=0)] = 8.0,
    share_encoder: Annotated[
        bool, opt.training("Make masks from the classifier's own trunk.", "--share-encoder/--no-share-encoder")
    ] = True,
    classifier_loss: Annotated[
        choices.ClassifierLoss, opt.training("Learn clean, then masked images, or from the sum of both losses (eq. 8).")
    ] = choices.ClassifierLoss.sequential,
    batch_norm: Annotated[
        choices.BatchNorm, opt.training("Batch statistics while training, or running statistics everywhere (eval).")
    ] = choices.BatchNorm.eval,
    epochs: opt.Epochs = 60,
    steps_per_epoch: opt.StepsPerEpoch = None,
    batch_size: opt.TrainingBatchSize = 128,
    lr_classifier: Annotated[float, opt.training("Learning rate of the classifier's SGD.", min=0)] = 2e-4,
    lr_mask: Annotated[float, opt.training("Learning rate of the mask network's Adam.", min=0)] = 3e-4,
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
    """Train a mask network on a classifier's trunk (CASM), for `saltern extract --method casm --checkpoint DIR`.

    With --val, measures LE and F1 and writes a page of masks after each epoch. A training that was stopped at any
    moment and is resumed with --resume ends with the same weights, bit for bit.
    """
    from saltern.pipeline.casm.training.train import TrainRequest, train

    hyperparameters = hyperparameters_of(ctx, preset, thinning)
    if hyperparameters.lam != "auto" and mask_area != MASK_AREA:
        raise UserError("--mask-area has no effect without --lambda auto; leave it out")
    checkpoint = train(collect(TrainRequest, ctx, hyperparameters=hyperparameters, val=val or ()))
    typer.echo(f"{checkpoint} is done; next: saltern extract ... --model {model} --method casm --checkpoint {out}")
