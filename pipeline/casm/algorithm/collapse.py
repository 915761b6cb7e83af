"""Notice a collapse: masks that take out nothing, or everything, for many steps in a row."""

from torch import Tensor, stack

from saltern.pipeline.training.trainee import Repeat

LOW, HIGH = 0.02, 0.98  # mean masks beyond which a step is dead
DEAD = 100  # dead steps in a row that are a collapse
SETBACKS = 2  # collapses after which a training is repeated from its last healthy checkpoint
SLOWER = 0.5  # factor on the mask network's learning rate after each of them
_EVERY = 20  # steps between two readings of the device, each of which waits for it


class Collapse(Repeat):
    """The masks have collapsed."""

    def __init__(self, step: int, area: float) -> None:
        super().__init__(step, area)
        self.step, self.area = step, area

    @property
    def what(self) -> str:
        """What the masks take out."""
        return "nothing" if self.area < LOW else "everything"


class Watch:
    """Counts dead steps. All ranks see the same areas, so that they notice a collapse at the same step."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._dead = 0

    @property
    def healthy(self) -> bool:
        """Whether the last step was not dead, as of the last `read`."""
        return self._dead == 0

    def add(self, step: int, area: Tensor) -> None:
        """Add a step and its mean mask over all ranks, on the device. Raises Collapse, soon after it happened."""
        self._waiting.append(area)
        if len(self._waiting) >= _EVERY:
            self.read(step)

    def read(self, step: int) -> None:
        """Read the steps added so far, the last of which has this number. Raises Collapse."""
        if not self._waiting:
            return
        for area in stack(self._waiting).tolist():
            self._dead = 0 if LOW <= area <= HIGH else self._dead + 1
        self._waiting = []
        if self._dead >= DEAD:
            raise Collapse(step, area)
