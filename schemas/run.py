"""The frozen config of a run, its fingerprint, and the list of wanted shards: what run.json holds."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from saltern.schemas.errors import UserError

SCHEMA_VERSION = 1  # of all that stands in a run's folder
# Kept in run.json and reused by a resume, since they move last bits; not part of the fingerprint.
PINNED = ("batch_size", "torch_threads")
# Where a thing comes from, not what it is: weights are known by their digest.
UNMARKED = ("weights", *PINNED)
EXTRACT, ATTACK, VISUALIZE = JOBS = ("extract", "attack", "visualize-class")
CLASSES = "classes://"  # begins the url of a shard that is a batch of classes


@dataclass(frozen=True, slots=True)
class Shard:
    """One wanted input tar; for visualize-class a batch of classes, `classes://243,281`, whose size is their number."""

    name: str  # path relative to the common root, without .tar; names the output files
    url: str  # path or object-store URL
    size: int  # bytes
    take: int | None = None  # only the first so many samples (--limit)


@dataclass(frozen=True)
class RunConfig:
    """All that decides what a run's files hold. Every value is JSON: str, int, float, bool, None, list, dict."""

    model: str
    weights: str
    weights_digest: str  # sha256 over the state dict
    classes: int  # logits of the model
    method: str
    layer: list[str]  # target layers by dotted name; empty where the method has none
    options: dict[str, Any]  # of the method
    target: str  # label | top1 | top:N | class:ID
    discretize: str  # rule by name, as mean:1
    map_size: str  # native | input
    map_dtype: str  # uint8 | float16 | float32
    save_map: bool
    resize: int  # shorter side before the crop, pixels
    crop: int  # side of the network's input, pixels
    squash: bool  # resize both sides to crop, aspect ratio lost
    interpolation: str  # bilinear | bicubic
    mean: list[float]  # of RGB in [0, 1]
    std: list[float]
    precision: str  # fp32 | bf16 | fp16
    seed: int
    limit: int | None  # samples of the whole run
    batch_size: int
    torch_threads: int  # of each worker
    job: str = EXTRACT  # one of JOBS; what a job does not use stands empty above
    job_options: dict[str, Any] = field(default_factory=dict)  # of the job itself; extract has none

    def fingerprint(self) -> str:
        """16 hex digits over all that changes results and nothing else."""
        marked = self.marked()
        raw = json.dumps({"schema_version": SCHEMA_VERSION, **marked}, sort_keys=True)
        return hashlib.sha256(raw.encode()).hexdigest()[:16]

    def marked(self) -> dict[str, Any]:
        """What the fingerprint is over. The job is left out of an extraction, so that older runs keep theirs."""
        left_out = (*UNMARKED, *(("job", "job_options") if self.job == EXTRACT else ()))
        return {key: value for key, value in asdict(self).items() if key not in left_out}

    def differences(self, other: "RunConfig") -> list[str]:
        """One line a differing key, `key: mine here, other there`; where weights come from does not count."""
        mine, theirs = self._flat(), other._flat()
        return [
            f"{key}: {mine.get(key)!r} there, {theirs.get(key)!r} asked for"
            for key in {**mine, **theirs}
            if key != "weights" and mine.get(key) != theirs.get(key)
        ]

    def _flat(self) -> dict[str, Any]:
        """All keys, those of the job beside the others."""
        flat = asdict(self)
        of_job = flat.pop("job_options")
        return {**flat, **of_job}

    @classmethod
    def from_dict(cls, made: Mapping[str, Any]) -> "RunConfig":
        """Raises UserError on an unknown or missing key."""
        known = [item.name for item in fields(cls)]
        check_keys(made, known, "the run's config")
        needed = [item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING]
        missing = [key for key in needed if key not in made]
        if missing:
            raise UserError(f"the run's config lacks {', '.join(missing)}")
        if made.get("job", EXTRACT) not in JOBS:
            raise UserError(f"the run's job {made['job']!r} is none of {', '.join(JOBS)}")
        return cls(**made)


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises UserError on the first unknown key, naming the nearest right one."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"unknown key {key!r} in {where}: {hint}")


@dataclass(frozen=True)
class Run:
    """What run.json holds."""

    config: RunConfig
    shards: list[Shard]
    versions: dict[str, str]
    fingerprint: str
    class_names: list[str] | None = None  # by class, where the model's are known

    def to_json(self) -> bytes:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, raw: bytes | str) -> "Run":
        """Raises UserError where the file is damaged or of another schema version."""
        try:
            made = json.loads(raw)
            version = made.pop("schema_version")
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"run.json is damaged ({error}); restore it, or start afresh with --overwrite") from error
        if version != SCHEMA_VERSION:
            raise UserError(f"run.json has schema version {version}, this saltern writes {SCHEMA_VERSION}")
        made["config"] = RunConfig.from_dict(made["config"])
        made["shards"] = [Shard(**shard) for shard in made["shards"]]
        return cls(**made)
