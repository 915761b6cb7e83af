"""Initial relevance of the logits of one image, written down again."""

import torch


def unit(logits_K, target):
    start = torch.full_like(logits_K, -1 / len(logits_K))
    start[target] = 1
    return start


def paper(logits_K, target):
    start = (-logits_K[target] / (len(logits_K) - 1)).repeat(len(logits_K))
    start[target] = logits_K[target]
    return start


def sglrp(logits_K, target):
    y = logits_K.exp() / logits_K.exp().sum()
    start = torch.tensor([-max(1e-8, float(y[target] * share)) for share in y], dtype=torch.float64)
    start[target] = max(1e-8, float(y[target] * (1 - y[target])))
    return start


def logit(logits_K, target):
    start = torch.zeros_like(logits_K)
    start[target] = logits_K[target]
    return start


STARTS = {"unit": unit, "paper": paper, "sglrp": sglrp, "logit": logit}
