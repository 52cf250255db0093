"""Load a directory, GGUF file or hub id as a frozen model, tensor by tensor.

    loaded = load_base(Base(model="Qwen/Qwen3-8B"), device.choose())
    loaded.model(input_ids)

The model is built from its config without weights. Then each stored tensor is put into it, in the
order of the files: linear layers are quantised in chunks of rows, the rest is cast. Besides the
finished model, host memory holds only one chunk.
"""

import copy
import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.base_files import BaseFiles, locate, open_checkpoint
from qlora_lite.model.config import reading_config, require_generation_settings
from qlora_lite.model.conversion import Place
from qlora_lite.model.facts import BaseFacts, read_facts
from qlora_lite.model.frozen import FrozenEmbedding, FrozenLinear, Scratch, Source
from qlora_lite.model.linears import linear_modules
from qlora_lite.model.prequantised import (
    is_packed,
    read_packed,
    require_readable_dtypes,
    stored_quant,
)
from qlora_lite.model.quant import BF16, FP32, NF4, Int8, Quant
from qlora_lite.model.quantise import Split, StoredWeight, copy_weight, quantise
from qlora_lite.model.settings import Base
from qlora_lite.model.towers import remove_other_towers
from qlora_lite.shards.checkpoint import Checkpoint

SplitOf = Callable[[str], Split | None]
"""path -> function whose result is quantised instead of that layer's weight; None: the weight."""

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all)"""


TRIM_EVERY_BYTES = 2**26
"""Bytes to read before freed memory is returned to the system again: it costs page faults."""


@dataclass(frozen=True)
class LoadedBase:
    """A frozen model and where it came from."""

    model: PreTrainedModel
    config: PretrainedConfig
    """Of the unquantised model."""
    files: BaseFiles
    checkpoint: Checkpoint
    rule: DeviceRule
    quant: Quant
    """Quantisation of the linear layers; that of the checkpoint if it was already quantised."""


def load_base(
    base: Base,
    rule: DeviceRule,
    *,
    facts: BaseFacts | None = None,
    files: BaseFiles | None = None,
    split: SplitOf | None = None,
    progress: Progress | None = None,
    installed: Callable[[nn.Module], None] | None = None,
) -> LoadedBase:
    """Read, quantise and install every weight.

    Args:
        facts: of this base; read here unless given.
        files: of this base; located here unless given.
        split: for methods that start from the quantisation error: what to quantise instead of a
            layer's weight. It gets each weight as one fp32 tensor.
        installed: called with every module whose weights are in place, so that they can be moved
            before the next ones are read.

    Raises:
        BaseModelError: if the model cannot be found, read, or loaded with these settings.
    """
    facts = facts or read_facts(base)
    require_possible_head(base, facts)
    files = files or locate(base)
    stored = stored_quant(facts.config, base.quant)
    checkpoint = open_checkpoint(files, facts)
    require_generation_settings(files.directory)
    require_readable_dtypes(checkpoint)
    model = build_empty(facts.config, base)
    loading = _Loading(model, checkpoint, facts, base, rule, split, stored is not None)
    loading.run(progress, installed)
    if (files.directory / "generation_config.json").exists():
        with reading_config(base.model):
            model.generation_config = GenerationConfig.from_pretrained(files.directory)
    checkpoint.close()
    return LoadedBase(model, model.config, files, checkpoint, rule, stored or base.quant)


def require_possible_head(base: Base, facts: BaseFacts) -> None:
    """Check that the model has a head of its own if it is to be quantised.

    Raises:
        BaseModelError: if its head is tied to the embedding.
    """
    if base.head != "16bit" and facts.shape.is_tied:
        raise BaseModelError(
            f"got base.head={base.head}, but the head of {base.model} is tied to its embedding, "
            "which stays in 16 bit. Use base.head=16bit"
        )


def build_empty(config: PretrainedConfig, base: Base) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers initialised.

    Raises:
        BaseModelError: if the architecture is unknown, or does not support `base.attention`.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = None if base.attention == "auto" else base.attention
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=base.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise BaseModelError(
            f"base.model={base.model}, base.attention={base.attention}: transformers cannot build "
            f"it: {str(error).splitlines()[0]} A causal language model is needed; "
            "base.attention=eager works for all of them"
        ) from error
    remove_other_towers(model)
    return model.eval().requires_grad_(False)


def allocated(module: nn.Module, leaf: str, rule: DeviceRule) -> nn.Parameter:
    """A parameter that is filled part by part, such as the experts of a layer. Its memory is
    allocated when it is asked for first."""
    parameter = module._parameters[leaf]
    assert parameter is not None, leaf
    if parameter.is_meta:
        value = torch.empty(parameter.shape, dtype=rule.compute, device=rule.device)
        parameter = nn.Parameter(value, requires_grad=False)
        module._parameters[leaf] = parameter
    return parameter


class _Loading:
    """One pass over the files of a checkpoint."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        facts: BaseFacts,
        base: Base,
        rule: DeviceRule,
        split: SplitOf | None,
        is_quantised: bool,
    ) -> None:
        self.model = model
        self.is_quantised = is_quantised
        self.checkpoint = checkpoint
        self.facts = facts
        self.base = base
        self.rule = rule
        self.split = split
        self.scratch = Scratch()
        self.storage = torch.float32 if isinstance(base.quant, FP32) else rule.storage
        self.head = model.get_output_embeddings()
        self.linears = {path for path, _ in linear_modules(model)}
        self.places = self._match()
        self.stored_names = {p.name: name for name, p in self.places.items() if p.part is None}

    def run(self, progress: Progress | None, installed: Callable[[nn.Module], None] | None) -> None:
        total, done, trimmed = self.checkpoint.num_bytes, 0, 0
        unread = Counter(_owner(place) for place in self.places.values())
        for name in self.checkpoint.names:
            if name in self.places:
                place = self.places[name]
                self._install(name, place)
                unread[_owner(place)] -= 1
                if installed is not None and self._is_complete(_owner(place), unread):
                    installed(self.model.get_submodule(_owner(place)))
            done += self.checkpoint.info(name).num_bytes
            if done - trimmed > TRIM_EVERY_BYTES:
                _trim_free_memory()
                trimmed = done
            if progress is not None:
                progress(done, total)
        _trim_free_memory()
        for tied, source in self.facts.tied.items():
            self._tie(tied, source)
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.rule.device)
        self.model.config.dtype = self.rule.compute
        left = [n for n, p in self.model.named_parameters() if p.is_meta]
        assert not left, f"no value for {left}"

    def _is_complete(self, path: str, unread: Counter[str]) -> bool:
        """Whether a module and all inside it have their values. Experts have them only after many
        tensors, but memory for all after the first."""
        prefix = f"{path}." if path else ""
        if unread[path] or any(n for p, n in unread.items() if p.startswith(prefix)):
            return False
        return not any(p.is_meta for p in self.model.get_submodule(path).parameters())

    def _match(self) -> dict[str, Place]:
        shapes = {p.name: p.shape for p in self.facts.shape.parameters}
        places = self.facts.places(self.checkpoint)
        whole = {name: place.name for name, place in places.items() if place.part is None}
        for name, ours in whole.items():
            shape = self.checkpoint.info(name).shape
            if ours in shapes and shape != shapes[ours] and not is_packed(self.checkpoint, name):
                raise BaseModelError(
                    f"base.model={self.base.model}: {name} has shape {shape}, but {shapes[ours]} "
                    "according to config.json. They belong to different models: download both again"
                )
        for tied, source in self.facts.tied.items():
            self._check_tie(tied, next(name for name, ours in whole.items() if ours == source))
        return places

    def _check_tie(self, tied: str, source: str) -> None:
        """Check that both tensors are equal if a checkpoint contains a tied tensor twice."""
        if tied == source or tied not in self.checkpoint:
            return
        if not torch.equal(self.checkpoint.read(tied), self.checkpoint.read(source)):
            raise BaseModelError(
                f"base.model={self.base.model}: its config.json ties {tied} to {source}, but they "
                'differ. If both were trained, put "tie_word_embeddings": false into config.json'
            )

    def _install(self, name: str, place: Place) -> None:
        path, _, leaf = place.name.rpartition(".")
        module = self.model.get_submodule(path)
        if place.part is not None:
            parameter = allocated(module, leaf, self.rule)
            place.part.of(parameter.data).copy_(self.checkpoint.read(name))
            return
        is_linear = path in self.linears
        if isinstance(module, FrozenLinear) or (is_linear and leaf == "bias"):
            return  # a bias is read with its weight
        if is_linear:
            self.model.set_submodule(path, self._linear(name, path, module))
        elif _is_embedding(module):
            self.model.set_submodule(path, self._embedding(name, module))
        elif leaf in module._buffers:
            module._buffers[leaf] = self.checkpoint.read(name).clone()
        else:
            tensor = self.checkpoint.read(name)
            if isinstance(module, nn.Embedding):  # of its own class: same values as the others
                tensor = tensor.to(self.storage)
            dtype = self.rule.norms if tensor.dim() == 1 else self.rule.compute
            if isinstance(module, nn.Embedding):  # of a class of its own, such as OPT's positions
                dtype = self.storage
            value = tensor.to(self.rule.device, dtype, copy=True)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _linear(self, name: str, path: str, module: nn.Module) -> FrozenLinear:
        bias_name = self.stored_names.get(f"{path}.bias")
        bias = None if bias_name is None else self.checkpoint.read(bias_name)
        if is_packed(self.checkpoint, name):
            return read_packed(self.checkpoint, name, self.rule, bias, self.scratch)
        source = StoredWeight(self.checkpoint, name, transposed=isinstance(module, Conv1D))
        if self.is_quantised and module is not self.head:
            # the checkpoint's own skip list, whatever it says, left this layer as it is
            weight = copy_weight(source, source.dtype, self.rule.device)
            return self._unquantised(weight, bias, source)
        if module is not self.head:
            hook = None if self.split is None else self.split(path)
            return quantise(source, self.base.quant, self.rule, bias, hook, self.scratch)
        if self.base.head == "16bit":
            weight = copy_weight(source, self.storage, self.rule.device)
            return self._unquantised(weight, bias, source)
        quant = Int8() if self.base.head == "int8" else NF4()
        return quantise(source, quant, self.rule, bias, scratch=self.scratch)

    def _unquantised(self, weight: Tensor, bias: Tensor | None, source: Source) -> FrozenLinear:
        quant = FP32() if weight.dtype == torch.float32 else BF16()
        if bias is not None:
            bias = bias.to(self.rule.device, self.rule.norms, copy=True)
        d_out, d_in = source.shape
        compute, products = self.rule.compute, self.rule.products
        return FrozenLinear(
            d_out, d_in, quant, compute, weight, None, bias, source, self.scratch, products
        )

    def _embedding(self, name: str, module: nn.Module) -> FrozenEmbedding:
        source = StoredWeight(self.checkpoint, name)
        weight = copy_weight(source, self.storage, self.rule.device)
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, float | int):
            scale = torch.tensor(float(scale))
        return FrozenEmbedding(weight, self.rule.compute, scale, source)

    def _tie(self, ours: str, source_name: str) -> None:
        """Make a parameter share the storage of another, such as the head that of the embedding."""
        path, _, leaf = ours.rpartition(".")
        module, shared = self.model.get_submodule(path), self.model.get_parameter(source_name)
        if module is self.head:
            bias_name = self.stored_names.get(f"{path}.bias")
            bias = None if bias_name is None else self.checkpoint.read(bias_name)
            source = StoredWeight(self.checkpoint, self.stored_names[source_name])
            module = self._unquantised(shared.data, bias, source)
            self.model.set_submodule(path, module)
        setattr(module, leaf, shared)


def _owner(place: Place) -> str:
    """Path of the module that has the parameter."""
    return place.name.rpartition(".")[0]


def _trim_free_memory() -> None:
    """Return freed memory to the system, if the C library is glibc.

    Otherwise it stays allocated, in holes between the codes of the layers: with chunks of 4 Mi
    weights that was 300 MiB on top of a model of 420 MiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_embedding(module: nn.Module) -> bool:
    """A plain look-up, or one that multiplies by a fixed scale."""
    return type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    )
