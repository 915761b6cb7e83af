"""One iteration of CASM's training, as published (Zolna 2020, algorithm 1), in one process or as one of many ranks.

Shape suffixes: B batch, C H W the network's input, K classes, h w the decoder's grid.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saltern.pipeline.casm.algorithm.collapse import SLOWER
from saltern.pipeline.casm.algorithm.control import Lambda
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.log import Log, measure
from saltern.pipeline.casm.algorithm.losses import coverage, mask_terms, pull, total_variation
from saltern.pipeline.casm.algorithm.pool import Confuser, Pool
from saltern.pipeline.casm.algorithm.thinning import Plan, plan, repeatable
from saltern.pipeline.masknet.network import Decoder, Trunk, enlarge
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.models.passes import logits_of

Average = Callable[[list[Tensor]], None]  # replaces each tensor by its mean over all ranks, in place


class _Clean(NamedTuple):
    loss: Tensor
    right_B: Tensor
    taps: list[Tensor]


class Training:
    """The state of a training, which each step on a batch updates: networks, optimisers, pool and lambda.

    All random numbers, also those of dropout, follow from the seed and the step's number, so that `state_dict` needs
    no generator.

    Args:
        classifier: with logits for the classes in play, on its device. Trained in place, except under thinning F.
        rank: of this process; seeds the draws in which ranks differ.
        average: replaces tensors by their means over the ranks: gradients, running statistics of BatchNorm, and
            measurements. All ranks must have batches of one size. They call it equally often, as the plan of a step
            is the same on each.
        side: of the images, pixels, for a classifier that takes no others.

    Raises:
        UserError: the classifier has no stages.
    """

    def __init__(
        self,
        classifier: nn.Module,
        hyperparameters: Hyperparameters,
        *,
        rank: int = 0,
        average: Average = lambda tensors: None,
        side: int | None = None,
    ) -> None:
        self.hyperparameters, self.classifier, self.steps_done = hyperparameters, classifier, 0
        self.setbacks = 0  # collapses before; each made the mask network's learning rate smaller
        self._rank, self._average, self._trained = rank, average, hyperparameters.thinning.trained
        self.device = next(classifier.parameters()).device
        stages = find_stages(classifier, side)
        self._trunk = Trunk(classifier, stages.names)
        draw = torch.Generator().manual_seed(hyperparameters.seed)
        self.decoder = Decoder(stages.channels, draw, hyperparameters.init_scale).to(self.device)
        self.encoder = None if hyperparameters.share_encoder else copy.deepcopy(classifier).requires_grad_()
        self._own = None if self.encoder is None else Trunk(self.encoder, stages.names, detached=False)
        self.classifier.requires_grad_(self._trained)
        self.pool = Pool(hyperparameters.pool_size, hyperparameters.pool_half, pinned=self.device.type == "cuda")
        self._confuser = Confuser(classifier) if hyperparameters.thinning.hp else None
        self._classifier_weights = list(classifier.parameters()) if self._trained else []
        self._mask_weights = [*self.decoder.parameters(), *(self.encoder.parameters() if self.encoder else ())]
        area = hyperparameters.mask_area if hyperparameters.lam == "auto" else None
        self._lambda = Lambda(hyperparameters.start_lambda(), area, self.device)
        self._statistics = [] if hyperparameters.batch_norm == "eval" else list(self._running())
        self._sgd = torch.optim.SGD(
            classifier.parameters(),
            hyperparameters.lr_classifier,
            momentum=hyperparameters.momentum,
            weight_decay=hyperparameters.weight_decay,
        )
        self._adam = torch.optim.Adam(
            self._mask_weights, hyperparameters.lr_mask, weight_decay=hyperparameters.weight_decay
        )

    def step(self, x_BCHW: Tensor, label_B: Tensor) -> Log:
        """Do one iteration on normalised images and their classes, int64."""
        hyperparameters, todo = self.hyperparameters, self.plan(self.steps_done)
        sequential = hyperparameters.classifier_loss == "sequential"
        self._prepare()
        with repeatable(self.device, hyperparameters.seed, self.steps_done, self._rank), torch.enable_grad():
            clean = self._classify(x_BCHW, label_B)
            if self._trained and sequential:
                self._descend(clean.loss)
            if todo.slot is not None:
                self._average(self._statistics)  # so that all ranks have the same pool
                self.pool.add(self.classifier, self.steps_done, todo.slot)
            logits_B1hw = self._mask_logits(x_BCHW, clean.taps)
            mask_B1hw = logits_B1hw.sigmoid()
            mask_B1HW = enlarge(mask_B1hw, x_BCHW.shape[2:])
            masked_logits_BK = self._classify_masked(x_BCHW * (1 - mask_B1HW), todo.member)
            masked_loss = F.cross_entropy(masked_logits_BK, label_B)
            terms = mask_terms(masked_logits_BK, label_B, clean.right_B, mask_B1HW, hyperparameters.score)
            variation = total_variation(mask_B1hw)
            pulled = self._pull(logits_B1hw)
            mask_loss = terms.loss(self._lambda.value.float()) + hyperparameters.tv * variation
            mask_loss = mask_loss + hyperparameters.pulling * pulled
            # The mask's gradient comes first: it passes through weights that the classifier's step changes.
            current = self._trained and todo.member < 0
            self._gradient(mask_loss, self._mask_weights, keep_graph=current)
            if self._trained and not sequential:
                self._descend((clean.loss + masked_loss if current else clean.loss) / 2)
            elif current:
                self._descend(masked_loss)
            nn.utils.clip_grad_norm_(self._mask_weights, hyperparameters.clip)
            self._adam.step()
        measured = measure(clean.loss, clean.right_B, masked_loss, terms, variation, pulled)
        self._average([measured, *self._statistics])
        weights = hyperparameters.tv, hyperparameters.pulling
        log = Log(self.steps_done, todo.member, measured, self._lambda.value, *weights)
        self._lambda.observe(log.area())
        self.steps_done += 1
        self._prefetch()
        return log

    def plan(self, step: int) -> Plan:
        """Return the pool operations of a step."""
        hyperparameters = self.hyperparameters
        own = self._rank if hyperparameters.pool_draw == "per-rank" else None
        return plan(hyperparameters.thinning, hyperparameters.pool_size, hyperparameters.seed, step, own)

    @torch.no_grad()
    def predict(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 logits_BK of the classifier, and mask_B1hw; all networks in eval mode.

        This changes nothing about the following steps.
        """
        for network in (self.classifier, self.decoder, self.encoder):
            if network is not None:
                network.eval()
        with self._autocast():
            logits_BK, taps = self._trunk(x_BCHW)
        return logits_BK.float(), self._mask_logits(x_BCHW, taps).sigmoid()

    def masks(self, x_BCHW: Tensor) -> Tensor:
        """Return mask_B1hw of `predict`."""
        return self.predict(x_BCHW)[1]

    def state_dict(self, *, pool: bool = True) -> dict[str, Any]:
        """Return the state that the next step depends on; live tensors, as in torch.

        Args:
            pool: False: only its manifest, as its members are kept in separate files.
        """
        return {
            "steps_done": self.steps_done,
            "setbacks": self.setbacks,
            **{name: part.state_dict() for name, part in self._parts()},
            "pool_manifest": self.pool.manifest(),
            **({"pool": self.pool.state_dict()} if pool else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`.

        Raises:
            UserError: the pool members are not those of the manifest.
        """
        self.pool.load_state_dict(state["pool"], state["pool_manifest"])
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self.steps_done, self.setbacks = state["steps_done"], state.get("setbacks", 0)  # absent in 0.1

    def _parts(self) -> Iterator[tuple[str, Any]]:
        yield from (("classifier", self.classifier), ("decoder", self.decoder), ("lambda", self._lambda))
        yield from (("sgd", self._sgd), ("adam", self._adam))
        if self.encoder is not None:
            yield "encoder", self.encoder

    def _running(self) -> Iterator[Tensor]:
        """Yield the BatchNorm statistics, which each rank updates by its own images."""
        for network in (
            self.decoder,
            *([self.classifier] if self._trained else []),
            *([self.encoder] if self.encoder else []),
        ):
            for name, value in network.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    yield value

    def _prepare(self) -> None:
        self.classifier.train(self._trained)
        networks = [self.classifier, self.decoder.train(), *([self.encoder.train()] if self.encoder else [])]
        if self.hyperparameters.batch_norm == "eval":
            for module in (part for network in networks for part in network.modules()):
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        factor = self.hyperparameters.rate(self.steps_done)
        for optimiser, rate in (
            (self._sgd, self.hyperparameters.lr_classifier),
            (self._adam, self.hyperparameters.lr_mask * SLOWER**self.setbacks),
        ):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor

    def _classify(self, x_BCHW: Tensor, label_B: Tensor) -> _Clean:
        with torch.set_grad_enabled(self._trained), self._autocast():
            logits_BK, taps = self._trunk(x_BCHW)
        return _Clean(F.cross_entropy(logits_BK.float(), label_B), logits_BK.argmax(1) == label_B, taps)

    def _mask_logits(self, x_BCHW: Tensor, taps: list[Tensor]) -> Tensor:
        with self._autocast():
            return self.decoder.logits(taps if self._own is None else self._own(x_BCHW)[1])

    def _pull(self, logits_B1hw: Tensor) -> Tensor:
        if not self.hyperparameters.pulling:
            return logits_B1hw.new_zeros(())
        shared_2 = coverage(logits_B1hw)
        self._average([shared_2])
        return pull(logits_B1hw.mean(), shared_2, self.hyperparameters.mask_area)

    def _classify_masked(self, masked_BCHW: Tensor, member: int) -> Tensor:
        """Return float32 logits_BK of the masked images, of a pool member or the current classifier (-1)."""
        with self._autocast():
            if member < 0 or self._confuser is None:
                logits_BK = logits_of(self.classifier(masked_BCHW))
            else:
                logits_BK = self._confuser.classify(masked_BCHW, self.pool.members[member])
        return logits_BK.float()

    def _gradient(self, loss: Tensor, weights: list[nn.Parameter], keep_graph: bool = False) -> None:
        for weight in weights:
            weight.grad = None
        torch.autograd.backward(loss, inputs=weights, retain_graph=keep_graph)
        self._average([weight.grad for weight in weights if weight.grad is not None])

    def _descend(self, loss: Tensor) -> None:
        self._gradient(loss, self._classifier_weights)
        self._sgd.step()

    def _prefetch(self) -> None:
        following = self.plan(self.steps_done)
        if self._confuser is not None and following.member >= 0 and following.member != following.slot:
            self._confuser.fetch(self.pool.members[following.member])

    def _autocast(self) -> torch.autocast:
        # A new one for each forward pass, without cache: a cache would keep weights from before an optimiser step.
        enabled = self.hyperparameters.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
