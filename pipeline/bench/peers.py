"""The same maps by the field's libraries, called as their users call them; each is absent where it is not installed.

Shape suffixes: B batch, C H W the network's input.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Tensor, Tensor], Any]  # (x_BCHW, target_B)
Make = Callable[[nn.Module, nn.Module | None, dict[str, Any]], Call]  # of the model, its target layer, our options


def _captum(name: str, **fixed: Any) -> Make:
    def make(model: nn.Module, layer: nn.Module | None, options: dict[str, Any]) -> Call:
        import captum.attr

        attribution = getattr(captum.attr, name)(model, *([] if layer is None else [layer]))

        def call(x_BCHW: Tensor, target_B: Tensor) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # captum announces the hooks that it sets
                return attribution.attribute(x_BCHW.detach().requires_grad_(), target=target_B, **fixed)

        return call

    return make


def _integrated(model: nn.Module, layer: nn.Module | None, options: dict[str, Any]) -> Call:
    return _captum("IntegratedGradients", n_steps=options["steps"], internal_batch_size=options["chunk"])(
        model, layer, options
    )


def _occlusion(model: nn.Module, layer: nn.Module | None, options: dict[str, Any]) -> Call:
    shape = (3, options["window"], options["window"])
    step = (3, options["stride"], options["stride"])
    make = _captum("Occlusion", sliding_window_shapes=shape, strides=step, perturbations_per_eval=options["chunk"] // 2)
    call = make(model, layer, options)

    def without_gradients(x_BCHW: Tensor, target_B: Tensor) -> Any:
        with torch.no_grad():
            return call(x_BCHW, target_B)

    return without_gradients


def _smoothgrad(model: nn.Module, layer: nn.Module | None, options: dict[str, Any]) -> Call:
    import captum.attr

    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(model))

    def call(x_BCHW: Tensor, target_B: Tensor) -> Any:
        number = {"nt_samples": options["samples"], "nt_samples_batch_size": max(1, options["chunk"] // len(x_BCHW))}
        return tunnel.attribute(
            x_BCHW.detach().requires_grad_(), target=target_B, nt_type="smoothgrad", stdevs=0.5, abs=False, **number
        )

    return call


def _pytorch_grad_cam(name: str) -> Make:
    def make(model: nn.Module, layer: nn.Module | None, options: dict[str, Any]) -> Call:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        def call(x_BCHW: Tensor, target_B: Tensor) -> Any:
            targets = [ClassifierOutputTarget(int(target)) for target in target_B]
            with getattr(pytorch_grad_cam, name)(model=model, target_layers=[layer]) as cam:
                if hasattr(cam, "batch_size"):
                    cam.batch_size = options["chunk"]
                return cam(input_tensor=x_BCHW, targets=targets)

        return call

    return make


def _torchcam(name: str) -> Make:
    def make(model: nn.Module, layer: nn.Module | None, options: dict[str, Any]) -> Call:
        import torchcam.methods

        def call(x_BCHW: Tensor, target_B: Tensor) -> Any:
            with getattr(torchcam.methods, name)(model, layer) as cam:
                return cam(target_B.tolist(), model(x_BCHW))

        return call

    return make


def _zennit(name: str) -> Make:
    def make(model: nn.Module, layer: nn.Module | None, options: dict[str, Any]) -> Call:
        from zennit import composites, rules
        from zennit.attribution import Gradient
        from zennit.torchvision import ResNetCanonizer

        if name == "alpha1beta0":
            maps = [
                (composites.Activation, rules.Pass()),
                (composites.Sum, rules.Norm()),
                (composites.AvgPool, rules.Norm()),
                (composites.Convolution, rules.AlphaBeta(alpha=1, beta=0)),
                (nn.Linear, rules.AlphaBeta(alpha=1, beta=0)),
            ]
            composite = composites.LayerMapComposite(maps, canonizers=[ResNetCanonizer()])
        else:
            composite = getattr(composites, name)()

        def call(x_BCHW: Tensor, target_B: Tensor) -> Any:
            with Gradient(model=model, composite=composite) as attributor:
                return attributor(x_BCHW, nn.functional.one_hot(target_B, 1000).to(x_BCHW))

        return call

    return make


PEERS: dict[str, dict[str, Make]] = {
    "cam": {"torchcam": _torchcam("CAM")},
    "gradient": {"captum": _captum("Saliency")},
    "deconvnet": {"captum": _captum("Deconvolution"), "zennit": _zennit("DeconvNet")},
    "guided-backprop": {"captum": _captum("GuidedBackprop"), "zennit": _zennit("GuidedBackprop")},
    "guided-grad-cam": {"captum": _captum("GuidedGradCam")},
    "input-x-gradient": {"captum": _captum("InputXGradient")},
    "integrated-gradients": {"captum": _integrated},
    "smoothgrad": {"captum": _smoothgrad},
    "occlusion": {"captum": _occlusion},
    "grad-cam": {
        "pytorch-grad-cam": _pytorch_grad_cam("GradCAM"),
        "torchcam": _torchcam("GradCAM"),
        "captum": _captum("LayerGradCam"),
    },
    "grad-cam++": {"pytorch-grad-cam": _pytorch_grad_cam("GradCAMPlusPlus"), "torchcam": _torchcam("GradCAMpp")},
    "layer-cam": {"pytorch-grad-cam": _pytorch_grad_cam("LayerCAM"), "torchcam": _torchcam("LayerCAM")},
    "hires-cam": {"pytorch-grad-cam": _pytorch_grad_cam("HiResCAM")},
    "xgrad-cam": {"pytorch-grad-cam": _pytorch_grad_cam("XGradCAM"), "torchcam": _torchcam("XGradCAM")},
    "eigen-cam": {"pytorch-grad-cam": _pytorch_grad_cam("EigenCAM")},
    "score-cam": {"pytorch-grad-cam": _pytorch_grad_cam("ScoreCAM"), "torchcam": _torchcam("ScoreCAM")},
    "ablation-cam": {"pytorch-grad-cam": _pytorch_grad_cam("AblationCAM")},
    "lrp": {"zennit": _zennit("alpha1beta0")},
}
