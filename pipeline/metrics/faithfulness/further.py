"""Further classifiers of an evaluation, which see the images as the run's own does."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from saltern.pipeline.extract.extraction import load_model
from saltern.pipeline.extract.request import absolute
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.probe import count_classes
from saltern.pipeline.naming import located
from saltern.schemas.config import ClassifierConfig, EvaluateConfig, ExtractConfig
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side


def further_classifiers(words: Sequence[str], config: ExtractConfig) -> tuple[ClassifierConfig, ...]:
    """Return the classifiers that the user names, loaded once to learn their digests.

    Args:
        words: MODEL or MODEL=WEIGHTS, as `classifiers.load` takes them.
        config: of the run whose crops they see.

    Raises:
        UserError: a name is empty, or a model is unknown, named twice or the run's own, or has other classes than
            the run's model.
    """
    if "" in words:
        raise UserError(f"--classifiers {','.join(words)}: a name is empty; give names with one comma between them")
    names = [config.model, *(located(word.partition("=")[0]) for word in words)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--classifiers names {name} twice, or it is the run's own model, which is always judged")
    return tuple(_further(word, config.seed, config.preprocess.crop, config.classes, config.model) for word in words)


@lru_cache(16)  # a command plans each evaluation several times
def _further(word: str, seed: int, side: Side, classes: int, own: str) -> ClassifierConfig:
    name, _, weights = word.partition("=")
    name, weights = located(name), absolute(weights or "DEFAULT")  # workers have other working folders
    classifier = classifiers.load(name, weights, seed=seed, side=side)
    # A model with its classes in its weights was not run yet.
    found = count_classes(classifier.model, side)
    if found != classes:
        raise UserError(
            f"--classifiers {name} has {found} classes, the run's {own} has {classes}: they must be the same"
        )
    preprocess = classifier.preprocess
    return ClassifierConfig(name, weights, classifier.digest, preprocess.mean, preprocess.std)


def load_further(how: EvaluateConfig, further: ClassifierConfig, device: torch.device) -> nn.Module:
    """Load a classifier of the evaluation's config onto the device. Raises UserError if its weights are others here."""
    own = replace(how, model=further.model, weights=further.weights, weights_digest=further.digest, prompts=None)
    return load_model(own, device)
