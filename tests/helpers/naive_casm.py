"""A slow, plain implementation of CASM from the algorithm's description. It shares no code with Saltern.

torch computes only convolution, batch normalisation and interpolation. Losses are computed image by image, optimisers
work weight by weight, and each member of the pool is a copied network.
"""

import copy
import math

import torch
import torch.nn.functional as F

#           trained  hp  lambda: entropy, classification
TABLE = {
    "F": (False, 0.0, {"entropy": 2.5, "classification": 9}),
    "L": (True, 0.0, {"entropy": 14, "classification": 18}),
    "FL": (True, 0.5, {"entropy": 7.5, "classification": 11}),
    "L100": (True, 0.5, {"entropy": 10, "classification": 17}),
}


class NaiveCasm:
    """Trains `net` (stem: conv, pool; stage1..stage4; fc) and a decoder whose weights are given.

    Args:
        decoder: conv1..conv4, gamma1.., beta1.., last, bias: leaf tensors.
        save_every: None: only the first snapshot.
        fault: one deliberate error: "late", "or", "alias".
        pull: (weight, wanted area) of the pull; None: as published.
    """

    def __init__(self, net, decoder, name, score, save_every, pool_size, lr_f, lr_m, fault="", pull=None):
        self.net, self.decoder, self.score, self.save_every, self.pool_size = net, decoder, score, save_every, pool_size
        self.trained, self.hp, lambdas = TABLE[name]
        self.lam, self.lr_f, self.lr_m, self.fault, self.pull = lambdas[score], lr_f, lr_m, fault, pull
        self.pool, self.iteration, self.replaced = [], 0, []
        self.velocity = {}
        self.adam = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in decoder.items()}

    def classify(self, net, x):
        taps = [net.pool(net.conv(x))]
        for stage in (net.stage1, net.stage2, net.stage3, net.stage4):
            taps.append(stage(taps[-1]))
        return net.fc(taps[-1].mean(3).mean(2)), taps

    def draw_mask(self, taps, side):
        d = self.decoder
        parts = [taps[0]]
        for i in (1, 2, 3, 4):
            y = F.conv2d(taps[i], d[f"conv{i}"])
            mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
            y = (y - mean) / (var + 1e-5) ** 0.5
            y = (y * d[f"gamma{i}"].view(1, -1, 1, 1) + d[f"beta{i}"].view(1, -1, 1, 1)).clamp(min=0)
            parts.append(F.interpolate(y, size=taps[0].shape[2:], mode="bilinear", align_corners=False))
        grid = torch.sigmoid(F.conv2d(torch.cat(parts, 1), d["last"], d["bias"], padding=1))
        times = side // grid.shape[2]
        return grid.repeat_interleave(times, 2).repeat_interleave(times, 3)

    def sgd(self, loss):
        names, weights = zip(*self.net.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        for name, weight, gradient in zip(names, weights, gradients, strict=True):
            gradient = gradient + 1e-4 * weight.data
            self.velocity[name] = 0.9 * self.velocity[name] + gradient if name in self.velocity else gradient
            weight.data -= self.lr_f * self.velocity[name]

    def adam_step(self, gradients):
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        t = self.iteration + 1
        for (key, weight), gradient in zip(self.decoder.items(), gradients, strict=True):
            gradient = gradient * min(1.0, 10 / (norm + 1e-6)) + 1e-4 * weight.data
            first, second = self.adam[key]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            self.adam[key] = first, second
            weight.data -= self.lr_m * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)

    def keep(self, slot_draw):
        every = self.save_every
        if not self.trained or self.hp == 0:
            return
        if self.pool and (every is None or self.iteration % every != every - 1):
            return
        kept = self.net if self.fault == "alias" else copy.deepcopy(self.net)
        if len(self.pool) < self.pool_size:
            self.pool.append(kept)
        else:
            slot = math.floor(slot_draw * self.pool_size)
            self.pool[slot] = kept
            self.replaced.append((self.iteration, slot))

    def step(self, x, labels, coin, pick, slot):
        self.net.train(self.trained)
        logits, taps = self.classify(self.net, x)
        clean = F.cross_entropy(logits, labels)
        if self.trained:
            self.sgd(clean)
        self.keep(slot)
        m = self.draw_mask([tap.detach() for tap in taps], x.shape[2])
        x_m = x * (1 - m)
        member = -1
        if self.pool and coin < self.hp:
            member = math.floor(pick * len(self.pool))
            judge = copy.deepcopy(self.pool[member]).eval()
        else:
            judge = self.net
        judged = self.classify(judge, x_m)[0]
        masked = F.cross_entropy(judged, labels)
        size, score, confused = 0, 0, 0
        for n in range(len(x)):
            right = int(logits[n].argmax()) == int(labels[n])
            wrong = int(judged[n].argmax()) != int(labels[n])
            q = 1.0 if ((right or wrong) if self.fault == "or" else (right and wrong)) else 0.0
            p = judged[n].exp() / judged[n].exp().sum()
            h = -sum(p[k] * p[k].log() for k in range(len(p)))
            size = size - self.lam * torch.clamp(q - m[n].mean(), min=0) / len(x)
            score = score + (-(h if right else 0 * h) if self.score == "entropy" else p[labels[n]].log()) / len(x)
            confused += q / len(x)
        loss = size + score
        if self.pull is not None:
            weight, area = self.pull
            mean_logit = (m.log() - (1 - m).log()).sum() / m.numel()
            mean = (m.sum() / m.numel()).item()
            offset = math.log(mean / (1 - mean)) - math.log(area / (1 - area))
            loss = loss + weight * (offset + (mean_logit - mean_logit.detach())) ** 2  # moves the mean logit
        if self.fault == "late" and self.trained and member < 0:
            self.sgd(masked)
        gradients = torch.autograd.grad(loss, list(self.decoder.values()), retain_graph=True)
        if self.fault != "late" and self.trained and member < 0:
            self.sgd(masked)
        self.adam_step(gradients)
        self.iteration += 1
        return {
            "clean_loss": clean.item(),
            "masked_loss": masked.item(),
            "mask_loss": loss.item(),
            "score_term": score.item(),
            "size_term": size.item(),
            "mask_mean": m.mean().item(),
            "confused": confused,
            "member": member,
        }
