"""Everything that the config of a base determines, before a weight is read.

    facts = read_facts(Base(model="Qwen/Qwen3-8B"))     # downloads only config.json
    facts.shape.num_parameters, facts.specs[0].path

A command reads this once and passes it to the memory plan, the checks, loading and the adapter.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.json_files import shown
from qlora_lite.model.config import read_config, reading_config
from qlora_lite.model.config_sizes import require_possible_sizes
from qlora_lite.model.conversion import Conversion, Place, Renamed, conversion_of
from qlora_lite.model.prequantised import COMPANION
from qlora_lite.model.probes import UNPACKED
from qlora_lite.model.settings import Base
from qlora_lite.model.shape import ModelShape, build_on_meta, shape_of
from qlora_lite.model.targets import LinearSpec, linear_specs
from qlora_lite.model.towers import remove_other_towers
from qlora_lite.shards.checkpoint import Checkpoint
from qlora_lite.shards.names import match

NOT_CAUSAL = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
)
"""Ends of the class names of models that were not trained to predict the next token."""

ENCODERS = frozenset([*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"])
"""Architectures that attend to later tokens, unless their config has `is_decoder` (XLM: `causal`).
A test probes those that are in transformers' list of causal language models too."""

UNTRAINABLE = {"reformer": "its backward is its own and gives adapters no gradients"}
"""Architectures (`model_type`) that run, but cannot be trained here, and why."""


@dataclass(frozen=True)
class BaseFacts:
    """The config of a base, and everything that follows from it."""

    config: PretrainedConfig
    """As in `config.json`. Copy it before changing it."""

    shape: ModelShape
    """Its dimensions, and every parameter's name, shape and role."""

    specs: tuple[LinearSpec, ...]
    """Its linear layers, in the model's order."""

    buffers: frozenset[str]
    """Names of buffers, which a checkpoint may contain."""

    tied: Mapping[str, str]
    """Tied parameters: name -> name of the parameter whose storage it shares."""

    prefix: str
    """Name of the decoder inside the model."""

    ignored: tuple[str, ...]
    """Patterns of stored tensors that the model's own code does not load."""

    unused: frozenset[str]
    """Names of the tensors of other towers than that for text, which are not loaded."""

    conversion: Conversion = field(compare=False)
    """The names of stored tensors in the model."""

    @property
    def packs(self) -> bool:
        """Whether packed rows are known to be separate; the loaded model is probed as well."""
        return self.config.get_text_config().model_type not in UNPACKED

    @property
    def vocabulary(self) -> int:
        """Number of rows of the embedding: token ids are below it."""
        return self.shape.vocab

    @property
    def context(self) -> int | None:
        """Number of positions that the model was trained on, if its config has it."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def match_names(self, stored: Collection[str]) -> dict[str, str]:
        """Map every tensor of a checkpoint that the model loads to its name in the model.

        Raises:
            BaseModelError: naming a missing parameter, or a tensor that the model does not have.
        """
        return self._match(stored, self.conversion.rename(stored))

    def places(self, checkpoint: Checkpoint) -> dict[str, Place]:
        """Where every tensor of a checkpoint that the model loads goes.

        Raises:
            BaseModelError: as `match_names`; and if a parameter that is stored in parts lacks one,
                or has a layout that is not supported.
        """
        renamed = self.conversion.rename(checkpoint.names)
        names = self._match(checkpoint.names, renamed)
        parts = renamed.parts(checkpoint, {p.name: p.shape for p in self.shape.parameters})
        return {stored: Place(ours, parts.get(stored)) for stored, ours in names.items()}

    def _match(self, stored: Collection[str], renamed: Renamed) -> dict[str, str]:
        return match(
            [name for name in stored if not COMPANION.search(name)],
            {parameter.name for parameter in self.shape.parameters},
            buffers=self.buffers,
            tied=self.tied,
            prefix=self.prefix,
            ignored=self.ignored,
            renamed=renamed.names,
            pieces=renamed.pieces,
            unused=self.unused,
        )


def read_facts(base: Base, known: Mapping[str, Any] | None = None) -> BaseFacts:
    """The facts of a model directory, a GGUF file or a hub id.

    Args:
        known: a partial config, used if the hub's is not on this machine.

    Raises:
        BaseModelError: if there is no such model, or transformers cannot build it.
    """
    config = read_config(base.model, base.revision, base.trust_remote_code, known=known)
    return facts_of(config, base.trust_remote_code)


def facts_of(config: PretrainedConfig, trust_remote_code: bool = False) -> BaseFacts:
    """The facts that follow from a config.

    Raises:
        BaseModelError: if transformers has no causal language model for it.
    """
    _require_causal(config)
    if config.model_type in UNTRAINABLE:
        raise BaseModelError(
            f"the architecture {config.model_type} is not supported: "
            f"{UNTRAINABLE[config.model_type]}. Use a decoder such as Llama, Qwen or GPT-2"
        )
    with reading_config(config.name_or_path or config.model_type):
        require_possible_sizes(config.name_or_path or config.model_type, config)
        model = build_on_meta(config, trust_remote_code)
        conversion = conversion_of(model)
        unused = remove_other_towers(model)
        shape = shape_of(model, config)
        _require_own_weights(shape, _tied(model))
        return BaseFacts(
            config=config,
            shape=shape,
            specs=tuple(linear_specs(shape)),
            buffers=frozenset(name for name, _ in model.named_buffers()),
            tied=_tied(model),
            prefix=str(model.base_model_prefix),
            ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),  # type: ignore[arg-type]
            conversion=conversion,
            unused=unused,
        )


def _require_causal(config: PretrainedConfig) -> None:
    """Refuse what the config itself calls something else than a causal language model.

    Raises:
        BaseModelError: for encoders and for encoder-decoder models.
    """
    classes = config.architectures or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise BaseModelError(
            f"base.model={config.name_or_path or config.model_type}: its config.json has "
            f"architectures={shown(classes)}, and a list of names is needed. Download it again"
        )
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    is_encoder = config.model_type in ENCODERS or any(n.endswith(NOT_CAUSAL) for n in classes)
    if config.is_encoder_decoder or (is_encoder and not is_decoder):
        kind = "an encoder-decoder model" if config.is_encoder_decoder else "an encoder"
        name = config.name_or_path or config.model_type
        raise BaseModelError(
            f"base.model={name} is {kind} ({', '.join(classes) or config.model_type}). A causal "
            "language model is needed, such as Llama, Qwen or GPT-2"
        )


def _require_own_weights(shape: ModelShape, tied: Mapping[str, str]) -> None:
    """Refuse models whose linear layers share weights with others, as Zamba's blocks do.

    Raises:
        BaseModelError: naming the first such layer.
    """
    shared = next((p for p in shape.linears.values() if p.name in tied or p.tied_to), None)
    if shared is not None:
        raise BaseModelError(
            f"the architecture {shape.family} is not supported yet: {shared.name} shares its "
            "weight with another layer, and an adapter would belong to both. Use a model whose "
            "layers have their own weights, such as Llama, Qwen or GPT-2"
        )


def _tied(model: nn.Module) -> dict[str, str]:
    return dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
