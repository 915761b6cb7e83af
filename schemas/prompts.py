"""The texts that are the classes of a model that compares images with texts."""

import base64
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saltern.schemas.errors import UserError

PLACE = "{}"  # of a class's words in a template


@dataclass(frozen=True)
class Prompts:
    """Classes by their texts, and the embeddings of the texts once they are made.

    The embeddings are stored, because another machine would make them with other last bits.
    """

    names: tuple[str, ...]  # of the classes, in the order of the logits
    words: tuple[tuple[str, ...], ...]  # of each class: one or more, each put into every template
    templates: tuple[str, ...] = (PLACE,)
    digest: str = ""  # sha256 of the embeddings, hex
    embeddings: str = ""  # base64 of float32, little-endian, (class, feature), each of length 1

    def texts(self) -> list[list[str]]:
        """Return the texts of each class, whose embeddings are averaged."""
        return [
            [template.replace(PLACE, word) for word in words for template in self.templates] for words in self.words
        ]

    def embedded(self, raw: bytes) -> "Prompts":
        """Return the prompts with embeddings, given as float32, little-endian, (class, feature)."""
        return replace(self, digest=hashlib.sha256(raw).hexdigest(), embeddings=base64.b64encode(raw).decode())

    def raw(self) -> bytes:
        """Return the bytes that `embedded` was given. Raises UserError if they do not have the digest."""
        raw = base64.b64decode(self.embeddings)
        if hashlib.sha256(raw).hexdigest() != self.digest:
            raise UserError("the embeddings of the run's prompts are damaged; --overwrite makes the run again")
        return raw

    def same_texts(self, other: "Prompts") -> bool:
        """Return whether both have the same classes and texts."""
        return (self.names, self.words, self.templates) == (other.names, other.words, other.templates)

    def to_stored(self) -> dict[str, Any]:
        """Return the form in run.json."""
        return {**self.marked(), "embeddings": self.embeddings}

    def marked(self) -> dict[str, Any]:
        """Return the form that the fingerprint covers and that the data files hold, without the embeddings."""
        words = [list(words) for words in self.words]
        return {"names": list(self.names), "words": words, "templates": list(self.templates), "digest": self.digest}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> "Prompts":
        """Return the prompts that `to_stored` gave."""
        words = tuple(tuple(words) for words in stored["words"])
        return cls(tuple(stored["names"]), words, tuple(stored["templates"]), stored["digest"], stored["embeddings"])


def number_of(name: str, names: Sequence[str]) -> int:
    """Return the number of the class with a name, written in any case. Raises UserError if not one class has it."""
    same = [number for number, known in enumerate(names) if known == name]
    same = same or [number for number, known in enumerate(names) if known.casefold() == name.casefold()]
    if len(same) == 1:
        return same[0]
    if same:
        numbers = ", ".join(map(str, same))
        raise UserError(f"--target prompt:{name}: the classes {numbers} have this name; give one as class:{same[0]}")
    shown = difflib.get_close_matches(name, names, 3, 0.4) or names[:3]
    more = f" and {len(names) - len(shown)} more" * (len(names) > len(shown))
    raise UserError(f"--target prompt:{name}: no prompt has this name; there are {', '.join(map(repr, shown))}{more}")
