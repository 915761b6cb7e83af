"""CASM: masks of a trained mask network, which answer to no single classifier.

Shape suffixes: B batch, C H W the network's input, K classes, h w the decoder's grid.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from saltern.pipeline.methods.base import Maps, Method, register
from saltern.pipeline.models.weights import fit
from saltern.schemas.errors import UserError

_ABSENT = -1e4  # logit of a class that was not trained on; fits 16 bits


@register("casm")
class CASM(Method):
    """What a mask network of `saltern train-casm` would take out of an image, whatever its class (Zolna 2020).

    In [0, 1], on the grid of the stem: a quarter of the input's side. Classifier and decoder are those of the
    checkpoint, weights included; of the model given, which must be of the same architecture, its structure alone is
    used. Logits are the trained classifier's; classes that it was not trained on have -10,000.

    Options:
        checkpoint: a training's folder, whose newest checkpoint counts, or a checkpoint's own.
        digest: of the checkpoint; another one is refused. Empty: any, and it is filled in.
    """

    needs_target = False
    default_map_dtype = "uint8"

    checkpoint: str = ""
    digest: str = ""

    def prepare(self) -> None:
        # The training builds on this package: at the top, its import would turn in a circle.
        from saltern.pipeline.masknet.checkpoint import open_checkpoint
        from saltern.pipeline.masknet.head import restrict
        from saltern.pipeline.masknet.network import Decoder, Trunk
        from saltern.pipeline.masknet.stages import find_stages

        if not self.checkpoint:
            raise UserError(
                "casm needs a trained mask network: --checkpoint DIR (-O checkpoint=DIR), of `saltern train-casm`"
            )
        found = open_checkpoint(Path(self.checkpoint))
        if self.digest not in ("", found.digest):
            raise UserError(
                f"{found.folder} is another checkpoint than the one asked for (digest {self.digest[:12]}...)"
            )
        # The folder itself, so that a training that goes on changes nothing for the workers of a run.
        self.checkpoint, self.digest = str(found.folder), found.digest
        self.options.update(checkpoint=self.checkpoint, digest=self.digest)
        source = f"{found.folder} (trained on {found.config['model']})"
        self._classes = found.config["classes"]
        self._width = found.config["model_classes"]
        like = next(self.model.parameters())
        classifier = copy.deepcopy(self.model).requires_grad_(False)
        if self._classes is not None:
            restrict(classifier, self._classes)
        stages = find_stages(classifier)
        encoder = copy.deepcopy(classifier) if "encoder" in found.tree else None
        decoder = Decoder(stages.channels).to(like.device, like.dtype).requires_grad_(False).eval()
        for network, part in ((classifier, "classifier"), (encoder, "encoder"), (decoder, "decoder")):
            if network is not None:
                fit(network, found.part(part), source)
        self._trunk, self._decoder = Trunk(classifier, stages.names), decoder
        self._encoder = None if encoder is None else Trunk(encoder, stages.names)

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        with torch.no_grad():
            logits_BK, taps = self._trunk(x_BCHW)
            if self._encoder is not None:
                taps = self._encoder(x_BCHW)[1]
            mask_B1hw = self._decoder(taps)
            return mask_B1hw[:, 0], self._widened(logits_BK), None

    def _widened(self, logits_BK: Tensor) -> Tensor:
        """The model's own classes, of which the trained classifier may know some alone."""
        if self._classes is None:
            return logits_BK
        wide_BK = logits_BK.new_full((len(logits_BK), self._width), _ABSENT)
        wide_BK[:, self._classes] = logits_BK
        return wide_BK

    def close(self) -> None:
        super().close()
        for held in ("_trunk", "_encoder", "_decoder"):
            self.__dict__.pop(held, None)
