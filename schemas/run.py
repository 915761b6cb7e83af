"""The content of run.json: a run's config, its shards, and the versions of packages that made it."""

from dataclasses import asdict, dataclass
from typing import TypeVar

from saltern.schemas.config import SCHEMA_VERSION, RunConfig, config_from_dict
from saltern.schemas.errors import DamagedRunError, UserError, printable
from saltern.schemas.seal import build, seal, unseal

CLASSES = "classes://"  # begins the URL of a shard that is a batch of classes

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True, slots=True)
class Shard:
    """An input tar; for visualize-class a batch of classes, `classes://243,281`, whose size is their number."""

    name: str  # path relative to the common root, without .tar; names the output files
    url: str  # path or object-store URL
    size: int  # bytes
    take: int | None = None  # samples to take from the start (--limit); None = all
    mtime_ns: int | None = None  # of the tar, when it was listed; None = unknown

    def unchanged(self, size: int, mtime_ns: int | None) -> bool:
        """Return whether the tar still has the size and the time that it was listed with."""
        return size == self.size and same_time(mtime_ns, self.mtime_ns)


def same_time(one: int | None, other: int | None) -> bool:
    """Return whether two times of a file's change, in ns, can be one: unknown, or equal at the coarser resolution.

    The same file has whole seconds in one listing and parts of it in another, in some stores and network file systems.
    """
    if one is None or other is None:
        return True
    unit = 1_000 if one % 10**9 and other % 10**9 else 10**9
    return one // unit == other // unit


def classes_of(shard: Shard) -> list[int]:
    """Return the classes of a shard of visualize-class, which its URL lists."""
    return [int(word) for word in shard.url.removeprefix(CLASSES).split(",")]


@dataclass(frozen=True)
class Run:
    """The content of run.json."""

    config: RunConfig
    shards: list[Shard]
    versions: dict[str, str]
    fingerprint: str
    class_names: list[str] | None = None  # by class, if the model's are known

    def config_of(self, kind: type[Config]) -> Config:
        """Return the config as the type of one job, or of some. Raises UserError if the run is of another job."""
        if not isinstance(self.config, kind):
            raise UserError(f"a run of {self.config.job} cannot be used here; it needs one of another job")
        return self.config

    @property
    def sealed(self) -> bool:
        """Return whether the run's files must have a seal; those of saltern 0.1 have none."""
        return not self.versions.get("saltern", "").startswith("0.1.")

    def to_json(self) -> bytes:
        stored = {
            "schema_version": SCHEMA_VERSION,
            "config": self.config.to_dict(),
            "shards": [asdict(shard) for shard in self.shards],
            "versions": self.versions,
            "fingerprint": self.fingerprint,
            "class_names": self.class_names,
        }
        return seal(stored)

    @classmethod
    def from_json(cls, raw: bytes) -> "Run":
        """Parse run.json. Raises DamagedRunError if it is damaged or edited, UserError for another version."""
        try:
            stored = unseal(raw, sealed=False)
            version = stored.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise UserError(f"run.json has schema version {version!r:.20}, this saltern writes {SCHEMA_VERSION}")
            stored["config"] = config_from_dict(stored["config"])
            stored["shards"] = [build(Shard, shard) for shard in stored["shards"]]
            run = build(cls, stored)
            if run.sealed:
                unseal(raw, sealed=True)
            if run.config.fingerprint() != run.fingerprint:
                raise ValueError("its fingerprint is not that of its config")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedRunError(f"run.json is damaged ({printable(str(error))})") from error
        return run
