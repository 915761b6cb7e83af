"""The same maps by other libraries, called as their users call them.

Shape suffixes: B batch, C H W the network's input.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.methods import Method


@dataclass(frozen=True)
class Problem:
    """A method on its model, and the batch that it explains."""

    model: nn.Module
    method: Method
    x_BCHW: Tensor
    target_B: Tensor

    def layers(self) -> list[nn.Module]:
        """Return the method's target layers."""
        return [self.model.get_submodule(name) for name in self.method.layer]


def peers_of(method: str) -> dict[str, Callable[[Problem], object]]:
    """Return the calls of the installed libraries that have a method, by library."""
    return {
        library: partial(_CALLS[library], name)
        for library, name in _NAMES.get(method, {}).items()
        if find_spec(library.replace("-", "_"))
    }


def _captum(name: str, problem: Problem) -> object:
    from captum import attr

    of, layers, options = problem.model, problem.layers(), _captum_options(name, problem)
    attribution = attr.NoiseTunnel(attr.Saliency(of)) if name == "NoiseTunnel" else getattr(attr, name)(of, *layers)
    with warnings.catch_warnings(), torch.set_grad_enabled(name != "Occlusion"):
        warnings.simplefilter("ignore")  # captum announces the hooks that it sets
        return attribution.attribute(problem.x_BCHW.detach().requires_grad_(), target=problem.target_B, **options)


def _captum_options(name: str, problem: Problem) -> dict[str, Any]:
    """Return captum's names for our options."""
    ours = problem.method.options
    if name == "IntegratedGradients":
        return {"n_steps": ours["steps"], "internal_batch_size": ours["chunk"]}
    if name == "NoiseTunnel":
        number = {"nt_samples": ours["samples"], "nt_samples_batch_size": max(1, ours["chunk"] // len(problem.x_BCHW))}
        return {"nt_type": "smoothgrad", "stdevs": 0.5, "abs": False, **number}
    if name == "Occlusion":
        window, strides = (3, ours["window"], ours["window"]), (3, ours["stride"], ours["stride"])
        return {"sliding_window_shapes": window, "strides": strides, "perturbations_per_eval": ours["chunk"] // 2}
    return {}


def _pytorch_grad_cam(name: str, problem: Problem) -> object:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(target) for target in problem.target_B.tolist()]
    with getattr(pytorch_grad_cam, name)(model=problem.model, target_layers=problem.layers()) as cam:
        if hasattr(cam, "batch_size"):
            cam.batch_size = problem.method.options["chunk"]
        return cam(input_tensor=problem.x_BCHW, targets=targets)


def _torchcam(name: str, problem: Problem) -> object:
    import torchcam.methods

    with getattr(torchcam.methods, name)(problem.model, *problem.layers()) as cam:
        return cam(problem.target_B.tolist(), problem.model(problem.x_BCHW))


def _zennit(name: str, problem: Problem) -> object:
    from zennit import composites
    from zennit.attribution import Gradient

    composite = _alpha1_beta0() if name == "alpha1beta0" else getattr(composites, name)()
    with Gradient(model=problem.model, composite=composite) as attributor:
        return attributor(problem.x_BCHW, F.one_hot(problem.target_B, 1000).to(problem.x_BCHW))


def _alpha1_beta0() -> object:
    from zennit import composites, rules
    from zennit.torchvision import ResNetCanonizer

    norm, alpha_beta = rules.Norm(), rules.AlphaBeta(alpha=1, beta=0)
    maps = [(composites.Activation, rules.Pass()), (composites.Sum, norm), (composites.AvgPool, norm)]
    maps += [(composites.Convolution, alpha_beta), (nn.Linear, alpha_beta)]
    return composites.LayerMapComposite(maps, canonizers=[ResNetCanonizer()])


_CALLS = {"captum": _captum, "pytorch-grad-cam": _pytorch_grad_cam, "torchcam": _torchcam, "zennit": _zennit}
_NAMES: dict[str, dict[str, str]] = {
    "cam": {"torchcam": "CAM"},
    "gradient": {"captum": "Saliency"},
    "deconvnet": {"captum": "Deconvolution", "zennit": "DeconvNet"},
    "guided-backprop": {"captum": "GuidedBackprop", "zennit": "GuidedBackprop"},
    "guided-grad-cam": {"captum": "GuidedGradCam"},
    "input-x-gradient": {"captum": "InputXGradient"},
    "integrated-gradients": {"captum": "IntegratedGradients"},
    "smoothgrad": {"captum": "NoiseTunnel"},
    "occlusion": {"captum": "Occlusion"},
    "grad-cam": {"pytorch-grad-cam": "GradCAM", "torchcam": "GradCAM", "captum": "LayerGradCam"},
    "grad-cam++": {"pytorch-grad-cam": "GradCAMPlusPlus", "torchcam": "GradCAMpp"},
    "layer-cam": {"pytorch-grad-cam": "LayerCAM", "torchcam": "LayerCAM"},
    "hires-cam": {"pytorch-grad-cam": "HiResCAM"},
    "xgrad-cam": {"pytorch-grad-cam": "XGradCAM", "torchcam": "XGradCAM"},
    "eigen-cam": {"pytorch-grad-cam": "EigenCAM"},
    "score-cam": {"pytorch-grad-cam": "ScoreCAM", "torchcam": "ScoreCAM"},
    "shapley-cam": {"pytorch-grad-cam": "ShapleyCAM"},
    "fullgrad": {"pytorch-grad-cam": "FullGrad"},
    "ablation-cam": {"pytorch-grad-cam": "AblationCAM"},
    "lrp": {"zennit": "alpha1beta0"},
}
