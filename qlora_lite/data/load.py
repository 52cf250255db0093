"""Data as a recipe describes it: tokenised, and divided into what is trained and what is held out.

A held-out row never is a training row as well, also not as a repetition: rows are told apart by
what they say. Which ones are held out depends on that and on the seed, not on their order.
"""

import hashlib
import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.examples import Examples
from qlora_lite.data.settings import Data
from qlora_lite.data.sources import Source, require_source
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import Stats, Tokenised, tokenise
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.seeds import derive


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for training and for evaluation."""

    train: Examples
    heldout: Examples
    """Empty if nothing is held out."""
    template: ChatTemplate
    stats: Stats
    """Of the source of the training rows, before any were held out."""
    heldout_stats: Stats | None
    """Of the held-out rows' own source, if they have one."""
    num_repeated: int
    """Training examples left out because the held-out file has them as well."""
    train_source: Source
    heldout_source: Source
    fingerprints: dict[str, str]
    """Hashes of everything that the tokens depend on, by what it is."""

    @property
    def fingerprint(self) -> str:
        """One hash of everything that the tokens depend on."""
        return _hash(json.dumps(self.fingerprints))


def load_data(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    """Read, tokenise and divide: the same for the same content, settings and seed.

    Raises:
        DataError: for anything wrong with a file or a row, with its place; if no row is left.
    """
    template = ChatTemplate(tokenizer)
    require_source("data.train", data.train)
    if data.heldout is not None:  # before the training rows are tokenised
        require_source("data.heldout", data.heldout)
    train = tokenise(data, data.train, template, data.max_rows)
    if data.heldout is not None:
        other = tokenise(data, data.heldout, template)
        drawn = draw(other.keys, data.max_heldout_rows, seed)
        taken = set(other.keys)
    else:
        other = train
        wanted = round(data.heldout_share * len(train.keys))
        wanted = min(max(1, wanted), data.max_heldout_rows) if data.heldout_share else 0
        drawn = taken = draw(train.keys, wanted, seed)
    kept = [i for i, key in enumerate(train.keys) if key not in taken]
    if not kept:
        if other is not train:
            raise DataError(
                f"{train.source.name}: every row is among those of data.heldout "
                f"({other.source.name}), so none is left to train on. Give rows that differ"
            )
        raise DataError(
            f"{train.source.name}: no row is left to train on, all are held out. Add rows that "
            "say something else, or take data.heldout_share=0"
        )
    num_taken = len(train.keys) - len(kept)
    return PreparedData(
        train=train.examples.select(kept) if num_taken else train.examples,
        heldout=other.examples.select([i for i, key in enumerate(other.keys) if key in drawn]),
        template=template,
        stats=train.stats,
        heldout_stats=None if other is train else other.stats,
        num_repeated=0 if other is train else num_taken,
        train_source=train.source,
        heldout_source=other.source,
        fingerprints=_fingerprints(data, template, train, other, seed),
    )


def draw(keys: list[bytes], wanted: int, seed: int) -> set[bytes]:
    """Keys of about `wanted` rows, by a lottery in which a row's number is its hash.

    All rows of one key are drawn together, and no more keys than needed.
    """
    counts: dict[bytes, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    salt = derive(seed, "heldout").to_bytes(8, "little")
    drawn: set[bytes] = set()
    total = 0
    for key in sorted(counts, key=lambda key: hashlib.blake2b(salt + key, digest_size=8).digest()):
        if total >= wanted:
            break
        drawn.add(key)
        total += counts[key]
    return drawn


def _fingerprints(
    data: Data, template: ChatTemplate, train: Tokenised, heldout: Tokenised, seed: int
) -> dict[str, str]:
    settings = data.model_dump(mode="json", exclude={"train", "heldout"})
    return {
        "train": train.source.fingerprint,
        "heldout": heldout.source.fingerprint,
        "tokenizer": _hash(template.tokenizer.backend_tokenizer.to_str()),
        "template": _hash(template.source),
        "settings": _hash(json.dumps([settings, seed], sort_keys=True)),
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
