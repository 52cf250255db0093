"""The text tower of a multimodal model, which is the part that is trained.

The other towers (images, sound) are not built into the model and not loaded. Their tensors stay in
the base's files, and merging copies them.
"""

from typing import Any

from torch import nn


def is_multimodal(model: Any) -> bool:
    """Whether the model has a text tower inside, with a config of its own."""
    return model.config.get_text_config(decoder=True) is not model.config


def text_tower(model: Any) -> nn.Module:
    """The part before the head that reads tokens: token ids to hidden states."""
    base: nn.Module = model.get_submodule(_base_path(model))
    tower: nn.Module = model.get_decoder() if is_multimodal(model) else base
    return tower


def remove_other_towers(model: Any) -> frozenset[str]:
    """Remove all towers of a multimodal model except the text tower.

    Returns the names of their parameters and buffers.
    """
    prefix, tower = _base_path(model), text_tower(model)
    base = model.get_submodule(prefix)
    if tower is base:
        return frozenset()
    names: set[str] = set()
    for path, child in list(base.named_children()):
        if not any(module is tower for module in child.modules()):
            names |= {f"{prefix}.{path}.{name}" for name in child.state_dict()}
            setattr(base, path, None)
    return frozenset(names)


def _base_path(model: Any) -> str:
    """Path of the model without its head."""
    path: str = model.base_model_prefix
    # the text models of Llama 4 and Llama 3.2 Vision are not at the path that they name
    return path if hasattr(model, path) else "model"
