"""Small transformers and gated networks of torchvision and timm, with random values in norms, biases and tables."""

import timm
import torch
from networks import randomise
from thin import thin
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

_TOKENS = ("pos_embed", "pos_embedding", "class_token", "cls_token", "dist_token", "reg_token")
_V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
_REGNET = BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
_BLOCKS = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]

MAKERS = {
    "vit": lambda: VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=10),
    "swin": lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10),
    "swin_v2": lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10, **_V2),
    "convnext": lambda: ConvNeXt(_BLOCKS, num_classes=10),
    "maxvit": lambda: models.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=10),
    "efficientnet": lambda: thin("efficientnet_b0", num_classes=10),
    "mobilenet_v3": lambda: thin("mobilenet_v3_small", num_classes=10),
    "regnet": lambda: RegNet(_REGNET, num_classes=10),
    "timm_vit": lambda: _timm("vit_tiny_patch16_224", depth=2, init_values=0.5, reg_tokens=2),
    "timm_deit": lambda: _timm("deit_tiny_distilled_patch16_224", depth=2),
    "timm_swin": lambda: _timm("swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=24, window_size=4),
}


def _timm(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, img_size=64, num_classes=10, **options)


def small(name: str, *, biases: bool = True) -> nn.Module:
    """Return a network in float64 and eval mode.

    Args:
        biases: False = all biases, positions and extra tokens are 0, as are the means of BatchNorm.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(MAKERS[name]())
        for key, value in model.named_parameters():
            added = key.endswith(("bias", "bias_table", *_TOKENS))
            if value.ndim == 4 and not added:
                nn.init.kaiming_normal_(value)
            elif added:
                nn.init.normal_(value, 0, 0.2 * biases)
            elif value.ndim == 1 or "scale" in key:
                nn.init.uniform_(value, 0.5, 1.5)
        for key, value in model.named_buffers():
            if key.endswith("running_mean") and not biases:
                value.zero_()
    model.image_size = 32 if name == "vit" else 64
    return model.double().eval()
