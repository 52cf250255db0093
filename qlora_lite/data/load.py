"""Load the data of a recipe: tokenise it, and split it into training rows and held-out rows.

A row with the same content as a held-out row is never trained, so duplicates cannot leak. Which
rows are held out depends on their content and the seed, not on their order.
"""

import hashlib
import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.examples import Examples
from qlora_lite.data.settings import Data
from qlora_lite.data.source_names import require_source
from qlora_lite.data.sources import Source
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import Report, Stats, Tokenised, ignore, tokenise
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.seeds import derive


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for training and for evaluation."""

    train: Examples
    heldout: Examples
    """Empty if nothing is held out."""
    template: ChatTemplate
    template_name: str | None
    """`data.template`"""
    stats: Stats
    """Of the training source, before rows were held out."""
    heldout_stats: Stats | None
    """Of the held-out source, if it is another one."""
    num_repeated: int
    """Training examples that were left out because the held-out file contains them."""
    train_source: Source
    heldout_source: Source
    fingerprints: dict[str, str]
    """Hashes of everything that the tokens depend on, by name."""

    @property
    def fingerprint(self) -> str:
        """One hash of everything that the tokens depend on."""
        return _hash(json.dumps(self.fingerprints))


def load_data(
    data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, report: Report = ignore
) -> PreparedData:
    """Read, tokenise and split. The result depends on content, settings and seed only.

    `report` is called several times a second with the number of rows read.

    Raises:
        DataError: for anything wrong with a file or a row, with its place; or if no row is left
            to train on.
    """
    template = ChatTemplate(tokenizer)
    require_source("data.train", data.train)
    if data.heldout is not None:  # fail before tokenising the training rows
        require_source("data.heldout", data.heldout)
    train = tokenise(data, data.train, template, data.max_rows, report)
    heldout = train
    if data.heldout is not None:
        heldout = tokenise(data, data.heldout, template, report=report)
    scored, excluded = _heldout_keys(data, train, heldout, seed)
    kept = [i for i, key in enumerate(train.keys) if key not in excluded]
    if not kept:
        raise DataError(_no_row_left(train, heldout))
    num_excluded = len(train.keys) - len(kept)
    return PreparedData(
        train=train.examples.select(kept) if num_excluded else train.examples,
        heldout=heldout.examples.select([i for i, k in enumerate(heldout.keys) if k in scored]),
        template=template,
        template_name=data.template,
        stats=train.stats,
        heldout_stats=None if heldout is train else heldout.stats,
        num_repeated=0 if heldout is train else num_excluded,
        train_source=train.source,
        heldout_source=heldout.source,
        fingerprints=_fingerprints(data, template, train, heldout, seed),
    )


def _heldout_keys(
    data: Data, train: Tokenised, heldout: Tokenised, seed: int
) -> tuple[set[bytes], set[bytes]]:
    """The keys of the rows to score, and of the rows that may not be trained."""
    if heldout is not train:
        return choose_heldout(heldout.keys, data.max_heldout_rows, seed), set(heldout.keys)
    wanted = round(data.heldout_share * len(train.keys))
    wanted = min(max(1, wanted), data.max_heldout_rows) if data.heldout_share else 0
    chosen = choose_heldout(train.keys, wanted, seed)
    return chosen, chosen


def _no_row_left(train: Tokenised, heldout: Tokenised) -> str:
    if heldout is not train:
        return (
            f"{train.source.name}: every row is also in data.heldout ({heldout.source.name}), so "
            "none is left to train on. Give different rows"
        )
    if len(set(train.keys)) == 1 and train.stats.rows > 1:
        return (
            f"{train.source.name}: all {train.stats.rows:,} rows are equal, so none is left to "
            "train on when one is held out. Add different rows, or set data.heldout_share=0"
        )
    return (
        f"{train.source.name}: no row is left to train on, all are held out. Add different rows, "
        "or set data.heldout_share=0"
    )


def choose_heldout(keys: list[bytes], wanted: int, seed: int) -> set[bytes]:
    """The keys of about `wanted` rows: those with the lowest salted hashes.

    All rows with the same key are chosen together, so there can be a few more than `wanted`.
    """
    counts: dict[bytes, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    salt = derive(seed, "heldout").to_bytes(8, "little")
    chosen: set[bytes] = set()
    total = 0
    for key in sorted(counts, key=lambda key: hashlib.blake2b(salt + key, digest_size=8).digest()):
        if total >= wanted:
            break
        chosen.add(key)
        total += counts[key]
    return chosen


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
