"""Models as people bring them, small: `odd_models:NAME` is a factory."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from making import Tiny
from torch import Tensor, nn


class _Around(nn.Module):
    """A module that holds the small network and passes its logits on; subclasses change what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def forward(self, x: Tensor) -> object:
        return self.net(x)


class Probabilities(_Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class OneLogit(_Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :1]


class Headless(_Around):
    def __init__(self) -> None:
        super().__init__()
        self.net.head = nn.Identity()


class Backbone(Tiny):
    num_classes = 0  # timm's mark


@dataclass
class Out:
    logits: Tensor


class Dict(_Around):
    def forward(self, x: Tensor) -> object:
        return {"logits": self.net(x)}


class OneOfThem(_Around):
    """Its logits have another name, but are the only tensor of two dimensions."""

    def forward(self, x: Tensor) -> object:
        return {"features": self.net.body(x), "scores": self.net(x)}


class Ambiguous(_Around):
    def forward(self, x: Tensor) -> object:
        return self.net(x), self.net(x) * 2


class Logits(NamedTuple):
    features: Tensor
    logits: Tensor


class Named(_Around):
    def forward(self, x: Tensor) -> object:
        return Logits(self.net.body(x).mean((2, 3)), self.net(x))


class Pair(_Around):
    def forward(self, x: Tensor) -> object:
        return self.net(x), None


class Data(_Around):
    def forward(self, x: Tensor) -> object:
        return Out(self.net(x))


class Wrap(nn.Module):
    """A layer that puts its input into a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, A: Tensor) -> object:
        return {"tuple": (A, None), "named": Logits(A, A), "dict": {"state": A}, "dataclass": Out(A)}.get(self.kind, A)


class _Wrapping(Tiny):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.wrap = Wrap(kind)

    def forward(self, x: Tensor) -> Tensor:
        found = self.wrap(self.body(x))
        A = {"dict": lambda: found["state"], "dataclass": lambda: found.logits}.get(self.wrap.kind, lambda: found[0])
        return self.head((found if self.wrap.kind == "plain" else A()).mean((2, 3)))


def _layer(kind: str) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        torch.manual_seed(0)
        return _Wrapping(kind)

    return factory


plain_layer, tuple_layer, named_layer, dict_layer, dataclass_layer = map(
    _layer, ("plain", "tuple", "named", "dict", "dataclass")
)


class Nothing(_Around):
    def forward(self, x: Tensor) -> None:
        return None


class Keyword(_Around):
    def forward(self, *, pixel_values: Tensor) -> object:
        return self.net(pixel_values)


class TwoInputs(_Around):
    def forward(self, x: Tensor, metadata: Tensor) -> object:
        return self.net(x)


class Slip(_Around):
    def forward(self, x: Tensor) -> object:
        return self.missing(x)


class Grey(_Around):
    def __init__(self) -> None:
        super().__init__()
        self.net.body[0] = nn.Conv2d(1, 8, 5, 4, 2)


class NonSquare(nn.Module):
    """Takes 64 x 32 only, as person re-identification models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 8), nn.Linear(4 * 8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


class Small(nn.Module):
    """Takes 64 x 64 only, and has ten classes; its last Linear module is not its head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.unused = nn.Conv2d(3, 4, 3, 8), nn.Linear(4 * 8 * 8, 10), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


class NoGrad(_Around):
    """A linear probe: the backbone runs under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            A = self.net.body(x)
        return self.net.head(A.mean((2, 3)))


class Nan(_Around):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.net.head.bias[3] = torch.nan


class Lazy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


class Turned(nn.Module):
    """Its layer `turned` transposes the grid, so that rows are columns; `tokens` numbers the cells backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.turned, self.tokens, self.head = (
            nn.Conv2d(3, 8, 8, 8), Swap(), Backwards(), nn.Linear(8, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        A = self.turned(self.conv(x).relu())
        return self.head((A.mean((2, 3)) + self.tokens(A).mean(1)) / 2)


class Swap(nn.Module):
    def forward(self, A: Tensor) -> Tensor:
        return A.mT


class Backwards(nn.Module):
    def forward(self, A: Tensor) -> Tensor:
        return A.mT.flatten(2).mT.flip(1)


class Attention(nn.Module):
    """A transformer whose layer `split` gives (batch, heads, tokens, dimension)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.split, self.head = nn.Conv2d(3, 32, 8, 8), Split(), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens_BTK = self.patches(x).flatten(2).mT
        heads_BHTd = self.split(tokens_BTK)
        return self.head(heads_BHTd.transpose(1, 2).flatten(2).mean(1))


class Split(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (2, 16)).transpose(1, 2)  # 16 tokens of 32 px


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
        return torch.jit.script(Tiny().eval())


def frozen() -> nn.Module:
    return Tiny().requires_grad_(False)


def training() -> nn.Module:
    return Tiny().train()


def half() -> nn.Module:
    return Tiny().half()


def parallel() -> nn.Module:
    return nn.DataParallel(Tiny())


class Segmenter(_Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net.body(x)


def no_module() -> object:
    return lambda x: x


def needs_an_argument(depth: int) -> nn.Module:
    return Tiny()


def compiled() -> nn.Module:
    return torch.compile(Tiny())


def compiled_inside() -> nn.Module:
    net = _Around()
    net.net.body = torch.compile(net.net.body)
    return net


def bfloat16() -> nn.Module:
    return Tiny().bfloat16()
