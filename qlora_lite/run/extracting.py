"""Cut the adapter of a finished run to another rank."""

import os
from pathlib import Path

from qlora_lite.adapters.files import save_at_rank
from qlora_lite.export.directory import find_finished, save_tokenizer
from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import complete_directory
from qlora_lite.foundation.sealed import digest_of
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_run


def extract(
    run: str | Path, out: str | Path, rank: int, *, trust_remote_code: bool = False
) -> float:
    """Write a run's adapter, cut to `rank`, as a PEFT adapter directory.

    DyLoRA is cut to any rank up to its own without loss, MoRA is approximated. Returns the largest
    relative error of a layer, 0 where there is none; `qlora_lite.json` records it too.

    Args:
        trust_remote_code: let the base run its own Python code.

    Raises:
        QloraLiteError: if there is no finished run, it cannot be cut to `rank`, or `out` exists.
    """
    out, folder = Path(out), RunFolder(Path(run))
    folder.read_record()
    request = digest_of([folder.read_sidecar(), rank])
    if (finished := find_finished(out, request)) is not None:
        return float(finished["relative_error"])
    if os.path.lexists(out):
        raise RunError(
            f"{out} exists already. Give a folder that does not exist, or remove this one"
        )
    loaded = load_run(run, trust_remote_code=trust_remote_code)
    assert loaded.attached is not None
    assert loaded.recipe is not None
    with complete_directory(out) as temporary:
        save_tokenizer(loaded.tokenizer, temporary)
        return save_at_rank(
            temporary,
            loaded.attached,
            rank,
            base=loaded.recipe.base.model,
            revision=loaded.recipe.base.revision,
            request=request,
        )
