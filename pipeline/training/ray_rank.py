"""The function of each worker of Ray Train. Its imports are inside, as Ray's controller imports this file too."""

import traceback
from typing import Any

import ray
import ray.train.torch

from saltern.schemas.errors import CollapseError, DeviceLostError, UserError


def train_rank(config: dict[str, Any]) -> None:
    """Train as one rank. Errors that another attempt cannot fix go to the driver as notes: kind and text.

    Kinds: said; collapse, a CollapseError; user, another UserError; code, another error that the machines did not
    cause. A note is a plain tuple: for a class of this module, the process of the queue would import torch.
    """
    from saltern.pipeline import machine
    from saltern.pipeline.training.loop import run
    from saltern.pipeline.training.ranks import Ranks

    context, queue = ray.train.get_context(), config["queue"]
    try:
        machine.share(context.get_local_world_size())
        machine.keep_memory()
        device = ray.train.torch.get_device()
        ranks = Ranks(device, context.get_world_rank(), context.get_world_size(), context.get_local_world_size())
        run(ray.get(config["plan"]), ranks, lambda text: queue.put(("said", text)))
    except CollapseError as error:
        queue.put(("collapse", str(error)))
        raise
    except UserError as error:
        queue.put(("user", str(error)))
        raise
    except (RuntimeError, OSError, DeviceLostError):  # lost ranks, devices and files: worth another attempt
        raise
    except Exception:
        queue.put(("code", traceback.format_exc()))
        raise
