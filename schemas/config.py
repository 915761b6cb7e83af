"""The frozen config of a run: one type for each job, and the flat form that run.json stores."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from saltern.schemas.errors import UserError
from saltern.schemas.prompts import Prompts
from saltern.schemas.rules import Rule, Target
from saltern.schemas.sizes import Side, shape_of, side_of

_SHOWN = 120  # characters of a value in a message
_EMBEDDED = "prompts: digest"  # key of the embeddings among the differences
SCHEMA_VERSION = 1  # of all files in a run's folder
# run.json keeps these and a resumed run reuses them, as they change last bits. The fingerprint leaves them out.
PINNED = ("batch_size", "torch_threads", "deterministic")
# Digests identify the weights and the checkpoint of a mask network, wherever they were loaded from.
UNMARKED = ("weights", "checkpoint", *PINNED)
EXTRACT, ATTACK, VISUALIZE = "extract", "attack", "visualize-class"
EVALUATE, EXPORT = "evaluate", "export"  # of the rows of a run
PILLOW = "pillow"  # of any version: it decoded the images of older runs
# The keys of a config in run.json, in their order, each with the value stored by a job that does not use the key.
_STORED: dict[str, Any] = {
    "model": "", "weights": "", "weights_digest": "", "classes": 0, "method": "", "layer": [], "options": {},
    "target": "", "discretize": "", "map_size": "", "map_dtype": "", "save_map": False, "resize": 0, "crop": 0,
    "squash": False, "interpolation": "", "mean": [], "std": [], "precision": "fp32", "seed": 0, "limit": None,
    "batch_size": 0, "torch_threads": 0, "job": EXTRACT, "job_options": {}, "labels": None,
    "image_member": None, "label_member": None, "decoder": PILLOW, "checkpoint": None, "deterministic": False,
    "compile": False, "prompts": None,
}  # fmt: skip
# Only in runs where they have another value than above: others keep their fingerprint.
_ABSENT = ("labels", "image_member", "label_member", "decoder", "checkpoint", "deterministic", "compile", "prompts")
_OPTIONAL = ("job", "job_options", *_ABSENT)  # runs made when `extract` was the only job have none of them


@dataclass(frozen=True)
class Preprocess:
    """Steps from an upright RGB image to the input: resize, centre crop, scale to [0, 1], (x - mean) / std."""

    resize: int = 256  # shorter side before the crop, pixels; the image covers the crop's shape of this shorter side
    crop: Side = 224  # side of the network's input, pixels; or its height and width
    squash: bool = False  # resize both sides to crop; the aspect ratio is lost
    interpolation: str = "bilinear"  # bilinear | bicubic, antialiased
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", side_of(self.crop))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return shape_of(self.crop)


@dataclass(frozen=True)
class Members:
    """The members of a sample that hold its image and its class."""

    image: str | None = None  # extension, such as image.jpg; None = the first of the usual ones
    label: str | None = None  # extension, or json:KEY; None = cls


@dataclass(frozen=True)
class PGD:
    """The settings of an attack by projected gradient descent."""

    steps: int  # of the descent, which starts from no perturbation
    step_size: float  # change of a pixel in one step, in [0, 1]; with normalised steps its root mean square
    epsilon: float  # largest change of a pixel (l_inf), in [0, 1]
    beta: float  # weight of the perturbation outside of the map; 0 is plain PGD
    norm: str = "rms"  # rms | l2, of that perturbation: root of the mean, or of the sum, of squares
    recompute: int = 0  # recompute the map of the perturbed image every so many steps; 0 = never
    rule: str = "normalised"  # normalised | sign: a step is the gradient at a fixed length, or its sign


@dataclass(frozen=True)
class Ascent:
    """The settings of a class visualization by gradient ascent."""

    steps: int
    step_size: float  # factor of a step's gradient
    weight: float  # lambda, of the squared norm
    init: str  # zero | noise, drawn for each class


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every job. A config determines the content of a run's files."""

    job: ClassVar[str]
    model: str
    weights: str
    weights_digest: str  # sha256 of the state dict
    classes: int  # logits of the model
    preprocess: Preprocess
    precision: str = "fp32"  # fp32 | tf32 | bf16 | fp16
    seed: int = 0
    batch_size: int
    torch_threads: int  # of each worker
    deterministic: bool = False  # operations that repeat to the bit; older runs had others on a GPU
    prompts: Prompts | None = None  # of a model that compares images with texts

    def to_dict(self) -> dict[str, Any]:
        """Return the config as run.json stores it: flat, JSON values only, the same keys for every job."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        own["prompts"] = self.prompts and self.prompts.to_stored()
        preprocess = asdict(self.preprocess)
        preprocess |= {"mean": list(self.preprocess.mean), "std": list(self.preprocess.std)}
        preprocess |= {} if isinstance(self.preprocess.crop, int) else {"crop": list(self.preprocess.crop)}
        values = {**_STORED, **own, **preprocess, "job": self.job, **self._to_stored()}
        return {key: values[key] for key in _STORED if key not in _ABSENT or values[key] != _STORED[key]}

    def _to_stored(self) -> dict[str, Any]:
        """Return the stored keys whose values differ from the fields of the same name."""
        return {}

    @classmethod
    def _from_stored(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields whose stored values have another form, by name."""
        return {}

    def fingerprint(self) -> str:
        """Return 16 hex digits over exactly the settings that change results."""
        raw = json.dumps({"schema_version": SCHEMA_VERSION, **self.marked()}, sort_keys=True)
        return hashlib.sha256(raw.encode()).hexdigest()[:16]

    def marked(self) -> dict[str, Any]:
        """Return the keys that the fingerprint covers. Extractions omit the job, so that older runs keep theirs."""
        left_out = (*UNMARKED, *(("job", "job_options") if self.job == EXTRACT else ()))
        texts = {"prompts": self.prompts.marked()} if self.prompts else {}
        return {key: value for key, value in (self.to_dict() | texts).items() if key not in left_out}

    def differences(self, other: "RunConfig") -> list[str]:
        """Return one line for each key that differs; the places of weights and checkpoint are not compared."""
        mine, theirs = _with_job_options(self), _with_job_options(other)
        differing = [
            key
            for key in {**mine, **theirs}
            if key not in ("weights", "checkpoint") and mine.get(key) != theirs.get(key)
        ]
        if any(key.startswith("prompts: ") and key != _EMBEDDED for key in differing):
            differing = [key for key in differing if key != _EMBEDDED]  # other texts have other embeddings
        return [
            f"{key}: {_short(mine.get(key, _STORED.get(key)))} there, "
            f"{_short(theirs.get(key, _STORED.get(key)))} requested"
            for key in differing
        ]


@dataclass(frozen=True, kw_only=True)
class MethodConfig(RunConfig):
    """The settings of a job that takes images through a saliency method."""

    method: str
    layer: list[str]  # target layers by dotted name; empty if the method has none
    options: dict[str, Any]  # of the method
    map_dtype: str  # uint8 | float16 | float32
    limit: int | None = None  # samples of the whole run
    labels: dict[int, int] | None = None  # the model's class for each number in `cls`; None: the same numbers
    image_member: str | None = None  # as in Members
    label_member: str | None = None
    decoder: str = PILLOW  # with its version, as `torchcodec 0.17.0`
    checkpoint: str | None = None  # of the mask network; its digest is among the options, as both were in 0.1

    @property
    def members(self) -> Members:
        return Members(self.image_member, self.label_member)

    @property
    def method_options(self) -> dict[str, Any]:
        """The options to build the method with."""
        return self.options if self.checkpoint is None else {**self.options, "checkpoint": self.checkpoint}


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(MethodConfig):
    """The config of `extract`."""

    job = EXTRACT
    target: Target
    discretize: Rule
    map_size: str = "native"  # native | input
    save_map: bool = True
    compile: bool = False  # the method's trunk, by torch.compile

    def _to_stored(self) -> dict[str, Any]:
        labels = None if self.labels is None else {str(given): self.labels[given] for given in sorted(self.labels)}
        return {"target": self.target.text, "discretize": self.discretize.text, "labels": labels}

    @classmethod
    def _from_stored(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        names = stored["prompts"]["names"] if stored.get("prompts") else ()
        target = Target.parse(stored["target"], stored["classes"], names)
        labels = stored.get("labels")
        return {
            "target": target,
            "discretize": Rule.parse(stored["discretize"]),
            "labels": None if labels is None else {int(given): number for given, number in labels.items()},
        }


@dataclass(frozen=True, kw_only=True)
class AttackConfig(MethodConfig):
    """The config of `attack`. run.json holds an empty `map_dtype`, because fingerprints of older runs include it."""

    job = ATTACK
    pgd: PGD
    save_images: bool

    def _to_stored(self) -> dict[str, Any]:
        # The first attacks stored the defaults of `extract`, so fingerprints include them.
        unused = {"target": "top1", "discretize": "mean:1", "map_size": "native", "save_map": True}
        return {**unused, "job_options": {**asdict(self.pgd), "save_images": self.save_images}}

    @classmethod
    def _from_stored(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(stored["job_options"])
        return {"save_images": options.pop("save_images"), "pgd": PGD(**options)}


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig(RunConfig):
    """The config of `visualize-class`."""

    job = VISUALIZE
    ascent: Ascent

    def _to_stored(self) -> dict[str, Any]:
        return {"job_options": asdict(self.ascent)}

    @classmethod
    def _from_stored(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        return {"ascent": Ascent(**stored["job_options"])}


@dataclass(frozen=True)
class ClassifierConfig:
    """A further classifier of an evaluation. It sees the run's crops, normalised as its own weights need."""

    model: str
    weights: str
    digest: str  # sha256 of the state dict
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RunConfig):
    """The config of `evaluate`: one family of metrics over the rows of another run."""

    job = EVALUATE
    family: str  # of metrics, a key of schemas.evaluation.FIELDS
    source: str  # fingerprint of the run whose rows are judged
    controls: bool  # judge the controls instead of the run's maps
    columns: tuple[str, ...]  # of the data files: a version with other columns measures again
    classifiers: tuple[ClassifierConfig, ...] = ()  # besides the run's own, in the order of the columns' values
    pixels: bool = False  # maps multiply pixels in [0, 1], so 0 is black; else the normalised image: the mean colour
    stages: int = 0  # of the family `sanity`: steps in which the layers become random; 0 = one for each layer

    def _to_stored(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("family", "source", "controls")}
        options["columns"] = list(self.columns)
        further = [{**asdict(one), "mean": list(one.mean), "std": list(one.std)} for one in self.classifiers]
        added = {
            "classifiers": further,
            "pixels": self.pixels,
            "stages": self.stages,
        }  # only where they are used: others keep their fingerprint
        return {"job_options": options | {name: value for name, value in added.items() if value}}

    @classmethod
    def _from_stored(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(stored["job_options"])
        further, columns = options.pop("classifiers", []), tuple(options.pop("columns", ()))
        further = [{**one, "mean": tuple(one["mean"]), "std": tuple(one["std"])} for one in further]
        return {**options, "columns": columns, "classifiers": tuple(ClassifierConfig(**one) for one in further)}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(RunConfig):
    """The config of `export`: the rows of another run in another format."""

    job = EXPORT
    form: str  # one of choices.ExportFormat
    source: str  # fingerprint of the run

    def _to_stored(self) -> dict[str, Any]:
        return {"job_options": {"form": self.form, "source": self.source}}

    @classmethod
    def _from_stored(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        return dict(stored["job_options"])


_KINDS: tuple[type[RunConfig], ...] = (ExtractConfig, AttackConfig, VisualizeConfig, EvaluateConfig, ExportConfig)
CONFIGS: dict[str, type[RunConfig]] = {kind.job: kind for kind in _KINDS}


def config_from_dict(stored: Mapping[str, Any]) -> RunConfig:
    """Return the config that run.json stores. Raises UserError on an unknown or missing key."""
    check_keys(stored, _STORED, "the run's config")
    missing = [key for key in _STORED if key not in stored and key not in _OPTIONAL]
    if missing:
        raise UserError(f"the run's config lacks {', '.join(missing)}")
    kind = CONFIGS.get(stored.get("job", EXTRACT))
    if kind is None:
        raise UserError(f"the run's job {stored['job']!r} is none of {', '.join(CONFIGS)}")
    preprocess = {item.name: stored[item.name] for item in fields(Preprocess)}
    preprocess |= {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])}
    own = {item.name: stored[item.name] for item in fields(kind) if item.name in stored}
    own["prompts"] = Prompts.from_stored(stored["prompts"]) if stored.get("prompts") else None
    return kind(**{**own, "preprocess": Preprocess(**preprocess), **kind._from_stored(stored)})


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UserError on the first unknown key, naming the nearest known one."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}" if known else "it has none"
            raise UserError(f"unknown key {key!r} in {where}: {hint}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _with_job_options(config: RunConfig) -> dict[str, Any]:
    stored = {**_STORED, **config.to_dict()}
    del stored["prompts"]
    texts = config.prompts.marked() if config.prompts else {}
    return {**stored, **stored.pop("job_options"), **{f"prompts: {key}": value for key, value in texts.items()}}
