"""Write docs/families.md from what the tiny models of tests/families.py show.

python -m tests.docs.families_page
"""

from pathlib import Path

import torch
import transformers
from torch import nn

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.facts import BaseFacts, facts_of
from qlora_lite.model.shape import build_on_meta
from tests.families import ALL, ALSO_TRAINED, LISTED, UNBUILT, tiny_config
from tests.model.test_probes import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

HEADER = """# Model families

A base is loaded if transformers has a causal language model for it. Tensors get the names of the
model by transformers' own rules, and merging writes them under the names of the base's files.

The families of this table are trained end to end as tiny models by
`tests/end_to_end/test_every_family.py`: loaded in NF4, loss equal to the model's own, two steps,
merged, read back by transformers with equal logits.

- **Rows.** Packed rows of a bin do not see each other. Where a model would mix them, each row is
  alone in its batch line, with padding.
- **Experts.** Fused experts stay in the compute dtype (16 bit on a card) and get no adapters; the
  layers around them do. `plan` says how many bytes they take.
- **Images and sound.** Only the text tower is loaded and trained. The other towers' tensors are
  copied into a merged model.

"""

REASONS = {
    "state": "one by one: a state goes on from token to token",
    "mask": "one by one: it does not use transformers' mask",
}


def listed() -> str:
    """The table of the families that are tried from end to end."""
    lines = [
        "| `model_type` | models | layers with adapters | experts | rows |",
        "|---|---|---|---|---|",
    ]
    for family, models in LISTED.items():
        facts = facts_of(tiny_config(family))
        names = sorted({spec.name for spec in facts.specs if spec.kind != "head"})
        experts = "16 bit" if facts.shape.experts else "-"
        layers = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| `{family}` | {models} | {layers} | {experts} | {_rows(facts)} |")
    return "\n".join(lines) + "\n"


def _rows(facts: BaseFacts) -> str:
    if facts.packs:
        return "packed"
    modules = build_on_meta(facts.config).modules()
    return REASONS["state" if any(isinstance(m, nn.Conv1d) for m in modules) else "mask"]


def others() -> str:
    """What is known of the other causal language models of transformers."""
    packed, alone, not_causal = [], [], []
    refused: dict[str, str] = {}
    for family in (family for family in ALL if family not in LISTED):
        try:
            facts = facts_of(tiny_config(family))
            facts.conversion.require_supported()
            if family in REFUSED:
                raise BaseModelError(REFUSED[family])
            (packed if facts.packs else alone).append(f"`{family}`")
        except BaseModelError as error:
            message = str(error).replace(f"base.model={family}", "").strip(": ")
            if "is an encoder" in message:
                not_causal.append(f"`{family}`")
            else:
                refused[family] = message
    lines = [
        "",
        f"## Other families of transformers {transformers.__version__}",
        "",
        "They take the same path. `tests/model/test_probes.py` probes whether their rows can be "
        f"packed. Some are trained as well: {', '.join(f'`{name}`' for name in ALSO_TRAINED)}.",
        "",
        f"Packed: {', '.join(packed)}.",
        "",
        f"One by one: {', '.join(alone)}.",
        "",
        "## Refused",
        "",
        "| `model_type` | message |",
        "|---|---|",
        *(f"| `{family}` | {message} |" for family, message in refused.items()),
        "",
        f"Encoders, and models with an encoder: {', '.join(not_causal)}.",
        "",
        f"Not tried: {'; '.join(f'`{family}` ({why})' for family, why in UNBUILT.items())}.",
        "",
        "Checkpoints that another library than bitsandbytes quantised (MXFP4, fp8, GPTQ, AWQ) are "
        "refused in every family.",
    ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    return HEADER + listed() + others()


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(), encoding="utf-8")
