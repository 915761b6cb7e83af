"""The map of a trained localizer, for no particular class.

Shape suffixes: B batch, C H W the network's input, K classes, h w the map's grid.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from torch import Tensor, float32, nn, no_grad

from saltern.pipeline.masknet.localizer import Head, Localizer, Saved, open_localizer
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.methods.base import Maps, Method
from saltern.pipeline.models.compiling import large_parts
from saltern.pipeline.models.passes import logits_of
from saltern.pipeline.models.weights import digest, fit
from saltern.schemas.errors import UserError


class LocalizerMap(Method):
    """Where a localizer trained by `saltern train-localizer` finds the object, whatever its class.

    Values are in [0, 1], on a grid of a quarter of the input's side: how sure it is that a pixel is in the mask that it
    learnt. Head, and trunk if it was tuned, come from the checkpoint. The given model must be
    of the architecture that the localizer was trained on, with a frozen trunk also of its weights. The logits are those
    of the given model.
    """

    name = "localizer"
    cost = "1 forward, and a small head; 2 with a tuned trunk"
    needs_target = False
    default_map_dtype = "uint8"
    default_rule = "fixed:0.5"

    checkpoint: Annotated[str, "Folder of `saltern train-localizer`."] = ""
    digest: Annotated[str, "Digest that the localizer must have; empty = any."] = ""

    def prepare(self) -> None:
        if not self.checkpoint:
            raise UserError(
                "localizer needs a trained one: --checkpoint DIR (-O checkpoint=DIR), of `saltern train-localizer`"
            )
        saved = open_localizer(Path(self.checkpoint))
        if self.digest not in ("", saved.digest):
            raise UserError(
                f"{self.checkpoint} is not the localizer of this run (digest {self.digest[:12]}, found "
                f"{saved.digest[:12]}); give the folder of that one as --checkpoint, or another --out"
            )
        self.checkpoint, self.digest = str(saved.folder), saved.digest
        self.options.update(checkpoint=self.checkpoint, digest=self.digest)
        self._load(saved)

    def _load(self, saved: Saved) -> None:
        like, trunk = next(self.model.parameters()), saved.part("trunk")
        model, source = self.model, f"{saved.folder} (trained on {saved.config['model']!r})"
        if trunk:
            model = copy.deepcopy(self.model).requires_grad_(False)
            fit(model, trunk, source)
        elif like.dtype == float32 and digest(self.model) != saved.config["weights_digest"]:
            raise UserError(
                f"the localizer in {source} was trained on other weights of the frozen trunk than this model has; give "
                "its --model and --weights"
            )
        stages = find_stages(model, self.input_side)
        head = Head(stages.channels[2:]).to(like.device, like.dtype).requires_grad_(False).eval()
        fit(head, saved.part("head"), source)
        self._localizer = Localizer(model, stages.names[2:], head)

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        with no_grad():
            map_Bhw, logits_BK = self._localizer.predict(x_BCHW)
            own = self._localizer.model is self.model
            return map_Bhw, logits_BK if own else logits_of(self.model(x_BCHW)), None

    def networks(self) -> Sequence[nn.Module]:
        return [*dict.fromkeys((self.model, self._localizer.model)), self._localizer.head]

    def trunk(self) -> Sequence[nn.Module]:
        return large_parts(self._localizer.model, self._localizer.modules)

    def passes(self, x_BCHW: Tensor) -> None:
        self.compute(x_BCHW, None)

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_localizer", None)
