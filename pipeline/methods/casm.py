"""CASM: masks of a trained mask network, for no particular class.

Shape suffixes: B batch, C H W the network's input, K classes, h w the decoder's grid.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from saltern.pipeline.masknet.checkpoint import Checkpoint, open_checkpoint
from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.masknet.network import Decoder, Trunk
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.methods.base import Maps, Method
from saltern.pipeline.models.compiling import large_parts
from saltern.pipeline.models.weights import fit
from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError, printable

_ABSENT = -1e4  # logit of a class outside the training; fits 16 bits


class CASM(Method):
    """The mask that a network trained by `saltern train-casm` removes from an image, whatever its class (Zolna 2020).

    Values are in [0, 1], on the grid of the stem: a quarter of the input's side. The weights of classifier and decoder
    come from the checkpoint. The given model contributes only its structure and must be of the same architecture.
    Logits are those of the trained classifier, and -10,000 for classes outside of its training.
    """

    name = "casm"
    cost = "1 forward, and a small decoder"
    needs_target = False
    default_map_dtype = "uint8"

    checkpoint: Annotated[str, "Folder of a training, for its newest checkpoint, or of one checkpoint."] = ""
    digest: Annotated[str, "Digest that the checkpoint must have; empty = any."] = ""

    def prepare(self) -> None:
        if not self.checkpoint:
            raise UserError(
                "casm needs a trained mask network: --checkpoint DIR (-O checkpoint=DIR), of `saltern train-casm`"
            )
        checkpoint = open_checkpoint(Path(self.checkpoint), self.digest)
        try:
            self._use(checkpoint)
        except UserError:
            raise
        except Exception as error:  # a damaged state has anything in any place
            reason = printable(f"{type(error).__name__}: {brief(error)}")
            raise UserError(f"the checkpoint {checkpoint.folder} is damaged ({reason})") from error

    def _use(self, checkpoint: Checkpoint) -> None:
        if self.digest not in ("", checkpoint.digest):
            raise UserError(
                f"{self.checkpoint} is not the checkpoint of this run or does not hold it (digest {self.digest[:12]}, "
                f"found {checkpoint.digest[:12]} of step {checkpoint.step}); give the folder of that one as "
                "--checkpoint, or another --out"
            )
        # Store the path of this checkpoint, so that all workers of a run use it even if the training continues.
        self.checkpoint, self.digest = str(checkpoint.folder), checkpoint.digest
        self.options.update(checkpoint=self.checkpoint, digest=self.digest)
        self._classes = checkpoint.config["classes"]
        self._width = checkpoint.config["model_classes"]
        self._load(checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        like = next(self.model.parameters())
        classifier = copy.deepcopy(self.model).requires_grad_(False)
        if self._classes is not None:
            restrict(classifier, self._classes, self.input_side)
        stages = find_stages(classifier, self.input_side)
        encoder = copy.deepcopy(classifier) if "encoder" in checkpoint.tree else None
        decoder = Decoder(stages.channels).to(like.device, like.dtype).requires_grad_(False).eval()
        source = f"{checkpoint.folder} (trained on {checkpoint.config['model']})"
        for network, part in ((classifier, "classifier"), (encoder, "encoder"), (decoder, "decoder")):
            if network is not None:
                fit(network, checkpoint.part(part), source)
        self._trunk, self._decoder = Trunk(classifier, stages.names), decoder
        self._encoder = None if encoder is None else Trunk(encoder, stages.names)

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        with torch.no_grad():
            logits_BK, taps = self._trunk(x_BCHW)
            if self._encoder is not None:
                taps = self._encoder(x_BCHW)[1]
            mask_B1hw = self._decoder(taps)
            return mask_B1hw[:, 0], self._widened(logits_BK), None

    def networks(self) -> Sequence[nn.Module]:
        trunks = [trunk.model for trunk in (self._trunk, self._encoder) if trunk is not None]
        return [*trunks, self._decoder]

    def trunk(self) -> Sequence[nn.Module]:
        trunks = [trunk for trunk in (self._trunk, self._encoder) if trunk is not None]
        return [part for trunk in trunks for part in large_parts(trunk.model, trunk.modules)]

    def passes(self, x_BCHW: Tensor) -> None:
        self.compute(x_BCHW, None)

    def _widened(self, logits_BK: Tensor) -> Tensor:
        """Return logits for all classes of the model; the trained classifier may know only some of them."""
        if self._classes is None:
            return logits_BK
        wide_BK = logits_BK.new_full((len(logits_BK), self._width), _ABSENT)
        wide_BK[:, self._classes] = logits_BK
        return wide_BK

    def close(self) -> None:
        super().close()
        for attribute in ("_trunk", "_encoder", "_decoder"):
            self.__dict__.pop(attribute, None)
