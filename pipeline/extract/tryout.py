"""Try a model and a method on one image of the run's size, before anything is written.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from saltern.pipeline.device import out_of_memory
from saltern.pipeline.extract.explain import AUTOCAST, Explainer
from saltern.pipeline.methods import Method
from saltern.pipeline.models.grids import check_layers
from saltern.pipeline.models.passes import Score, frozen, logits_of, score_gradients
from saltern.pipeline.models.probe import failure, probe
from saltern.schemas.config import ExtractConfig, MethodConfig, RunConfig
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Target
from saltern.schemas.run import Run
from saltern.schemas.sizes import Side


def is_proven(config: RunConfig, existing: Run | None) -> bool:
    """Return whether an existing run of this config has been tried already."""
    return existing is not None and existing.fingerprint == config.fingerprint()


def try_method(method: Method, config: MethodConfig) -> None:
    """Explain one random image by the method, after its layers' grids. Raises UserError if either fails."""
    try_layers(method, config)
    x_BCHW = probe(method.model, config.preprocess.crop)[:1]
    with one_line(method.model, x_BCHW):
        method(x_BCHW)


def try_layers(method: Method, config: MethodConfig) -> None:
    """Check the grids of the method's layers. Raises UserError."""
    if not method.layers_are_grids:
        return
    side = config.preprocess.crop
    with one_line(method.model, probe(method.model, side)):
        check_layers(method.model, method.layer, side)


def try_extract(method: Method, config: ExtractConfig, device: str) -> None:
    """Explain one random image on the CPU, as a worker will.

    Args:
        method: built on the run's model.
        config: of the run.
        device: of the workers. On a GPU 16 bits are not tried, because CPUs lack some of their operations.

    Raises:
        UserError: the model or the method fails on it.
    """
    try_layers(method, config)
    # More targets would only cost time.
    target = Target.parse("top1", config.classes) if config.target.kind == "top" else config.target
    precision = config.precision if device == "cpu" else "fp32"
    tried = replace(config, target=target, precision=precision, compile=False)
    explain = Explainer.of_run(tried, method, torch.device("cpu"))
    shape = (1, *config.preprocess.shape, 3)
    pixels_BHWC = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with one_line(method.model, pixels_BHWC.permute(0, 3, 1, 2)):
        explain(pixels_BHWC, torch.zeros(1, dtype=torch.long)).wait()
    if config.precision not in AUTOCAST and not method.last.logits_BK.isfinite().all():
        raise UserError(f"{config.model} gives logits that are not finite for a random image; check its weights")


def try_gradient(model: nn.Module, side: Side) -> None:
    """Check that the logits of one random image have a gradient in its pixels. Raises UserError."""
    x_BCHW = probe(model, side)[:1].requires_grad_()
    with one_line(model, x_BCHW), torch.enable_grad(), frozen(model):
        logits_BK = logits_of(model(x_BCHW))
        (gradient,) = score_gradients(logits_BK, Score(logits_BK.argmax(1)), [x_BCHW])
    if gradient is None:
        raise UserError(f"the logits of {type(model).__name__} have no gradient: its forward has no_grad or detach")


@contextmanager
def one_line(model: nn.Module, x_BCHW: Tensor) -> Iterator[None]:
    """Raise any error as a UserError that names the cause and its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise UserError("one image does not fit in this machine's memory; give a smaller --crop") from error
        raise UserError(failure(model, x_BCHW, error)) from error
