"""Private and undocumented names of other libraries that the source uses.

They may change in any release, so each is in a table with the files that use it and a check that it
exists and takes what we pass. Upper bounds in `pyproject.toml` are there for these names. The first
test reads the source, so that no name can be missing in the table, or stay there unused.

What counts: a module or an attribute that starts with an underscore, unless the same file defines
it, or it is an attribute of `self` that any of our files defines; everything under `torch.ops`; a
private name, or a name put together at run time, in `getattr`; and whatever is taken from a
submodule of transformers or bitsandbytes that is not listed as public.
"""

import ast
import inspect
import os
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.requirements import Requirement
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.gguf import gguf_tokenizer_mapping
from transformers.models.auto import modeling_auto

ROOT = Path(__file__).parents[1]
FILES = [
    file
    for folder in ("qlora_lite", "tools")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not file.is_relative_to(ROOT / "qlora_lite" / "recipes")
]

SUBMODULES_ARE_PRIVATE = ("transformers", "bitsandbytes")
BY_STRING = ("getattr", "hasattr", "setattr")
PUBLIC = ("bitsandbytes.nn.", "bitsandbytes.optim.", "transformers.utils.logging")


def _takes(function: Callable, *args: object, **kwargs: object) -> bool:
    inspect.signature(function).bind(*args, **kwargs)
    return True


def _arguments(operator: object) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


def _cpu_kernels() -> list[object]:
    from qlora_lite.kernels.dequantise import _SHORT, _kernel

    return [_kernel(kind, dtype) for kind in ("nf4", "fp4") for dtype in _SHORT]


def _quant_state() -> object:
    """As prequantised.py reads it: of a weight with double quantisation."""
    f = bitsandbytes.functional
    state = f.quantize_4bit(torch.ones(64, 64), quant_type="nf4", compress_statistics=True)[1]
    packed = state.as_dict(packed=True)
    return f.QuantState.from_dict(packed, torch.device("cpu"))


def _render() -> tuple[list[str], list[list[tuple[int, int]]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(
        conversations=[[{"role": "user", "content": "a"}]],
        chat_template="{% for m in messages %}x{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfor %}",
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        eos_token="</s>",
    )


def _dispatch_mode() -> bool:
    from torch.utils._python_dispatch import TorchDispatchMode

    return callable(TorchDispatchMode.__torch_dispatch__)


def _tree_leaves() -> bool:
    from torch.utils._pytree import tree_leaves

    return tree_leaves([1, {"a": (2,)}]) == [1, 2]


def _converter() -> core_model_loading.WeightConverter:
    steps = [core_model_loading.MergeModulelist(dim=0), core_model_loading.Concatenate(dim=1)]
    return core_model_loading.WeightConverter(["a.*.x", "a.*.y"], "c", operations=steps)


def _is_public(submodule: str, name: str) -> bool:
    """The class of this submodule is the one that transformers exports."""
    return getattr(getattr(transformers, submodule), name) is getattr(transformers, name)


TABLE: dict[str, tuple[tuple[str, ...], Callable[[], object]]] = {
    # torch
    "._buffers": (
        (
            "qlora_lite/adapters/attach.py",
            "qlora_lite/adapters/layer.py",
            "qlora_lite/export/verify.py",
            "qlora_lite/model/load.py",
        ),
        lambda: isinstance(nn.Module()._buffers, dict),
    ),
    "._parameters": (
        (
            "qlora_lite/adapters/layer.py",
            "qlora_lite/export/verify.py",
            "qlora_lite/model/load.py",
        ),
        lambda: isinstance(nn.Module()._parameters, dict),
    ),
    "torch._check": (
        ("qlora_lite/kernels/dequantise.py",),
        lambda: _takes(torch._check, True, lambda: "message"),
    ),
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": (
        ("qlora_lite/kernels/speed.py",),
        lambda: isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool),
    ),
    "torch.ops.mkldnn._linear_pointwise": (
        ("qlora_lite/kernels/product.py",),
        lambda: (
            _arguments(torch.ops.mkldnn._linear_pointwise.default)
            == ["X", "W", "B", "attr", "scalars", "algorithm"]
        ),
    ),
    "._cdata": (
        ("tools/benchmark/live_bytes.py", "tools/benchmark/method_study/cost.py"),
        lambda: torch.zeros(1).untyped_storage()._cdata,
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": (
        ("tools/benchmark/live_bytes.py",),
        _dispatch_mode,
    ),
    "torch.utils._pytree.tree_leaves": (("tools/benchmark/live_bytes.py",), _tree_leaves),
    # bitsandbytes
    "torch.ops.bitsandbytes.quantize_4bit.default": (
        ("qlora_lite/model/quantise.py",),
        lambda: (
            _arguments(torch.ops.bitsandbytes.quantize_4bit.default)
            == ["A", "blocksize", "quant_type", "quant_storage"]
        ),
    ),
    "torch.ops.bitsandbytes.dequantize_4bit.out": (
        ("qlora_lite/kernels/dequantise.py",),
        lambda: (
            _arguments(torch.ops.bitsandbytes.dequantize_4bit.out)
            == ["A", "absmax", "blocksize", "quant_type", "shape", "dtype", "out"]
        ),
    ),
    "torch.ops.bitsandbytes.dequantize_blockwise.default": (
        ("qlora_lite/model/frozen.py",),
        lambda: (
            _arguments(torch.ops.bitsandbytes.dequantize_blockwise.default)
            == ["A", "absmax", "code", "blocksize", "dtype"]
        ),
    ),
    "bitsandbytes.cextension.lib": (
        ("qlora_lite/kernels/dequantise.py",),
        lambda: bitsandbytes.cextension.lib,
    ),
    "._lib": (
        ("qlora_lite/kernels/dequantise.py",),
        lambda: bitsandbytes.cextension.lib._lib,
    ),
    ".cdequantize_blockwise_cpu_{kind}_{_SHORT[dtype]}": (
        ("qlora_lite/kernels/dequantise.py",),
        lambda: None not in _cpu_kernels(),
    ),
    "bitsandbytes.functional.get_4bit_type": (
        ("qlora_lite/kernels/dequantise.py",),
        lambda: bitsandbytes.functional.get_4bit_type("nf4", device="cpu").shape == (16,),
    ),
    "bitsandbytes.functional.quantize_blockwise": (
        ("qlora_lite/model/quantise.py",),
        lambda: (
            bitsandbytes.functional.quantize_blockwise(torch.ones(256), blocksize=256)[1].absmax
        ),
    ),
    "bitsandbytes.functional.dequantize_blockwise": (
        ("qlora_lite/training/moments.py",),
        lambda: _takes(
            bitsandbytes.functional.dequantize_blockwise,
            torch.zeros(256, dtype=torch.uint8),
            absmax=torch.ones(1),
            code=torch.ones(256),
            blocksize=256,
        ),
    ),
    "bitsandbytes.functional.int8_vectorwise_quant": (
        ("qlora_lite/model/quantise.py",),
        lambda: len(bitsandbytes.functional.int8_vectorwise_quant(torch.ones(2, 4).half())) == 3,
    ),
    "bitsandbytes.functional.create_dynamic_map": (
        ("qlora_lite/model/quantise.py",),
        lambda: bitsandbytes.functional.create_dynamic_map().shape == (256,),
    ),
    "bitsandbytes.functional.QuantState": (
        ("qlora_lite/model/prequantised.py",),
        lambda: (
            _quant_state().state2.blocksize == 256
            and _quant_state().state2.code.shape == (256,)
            and _quant_state().offset.dim() == 0
        ),
    ),
    # transformers
    "._keys_to_ignore_on_load_unexpected": (
        ("qlora_lite/model/facts.py",),
        lambda: transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected is None,
    ),
    "transformers.conversion_mapping.get_model_conversion_mapping": (
        ("qlora_lite/model/conversion.py",),
        lambda: _takes(get_model_conversion_mapping, nn.Module()),
    ),
    "transformers.core_model_loading.rename_source_key": (
        ("qlora_lite/model/conversion.py",),
        lambda: (
            core_model_loading.rename_source_key("a.b", [], [], "m", {"m.a.b": True})
            == (
                "m.a.b",
                None,
            )
        ),
    ),
    "transformers.core_model_loading.dot_natural_key": (
        ("qlora_lite/model/conversion.py",),
        lambda: sorted(["a.10.b", "a.9.b"], key=core_model_loading.dot_natural_key)[0] == "a.9.b",
    ),
    "transformers.core_model_loading.WeightRenaming": (
        ("qlora_lite/model/conversion.py",),
        lambda: core_model_loading.WeightRenaming("a", "b").source_patterns == ["a"],
    ),
    "transformers.core_model_loading.WeightConverter": (
        ("qlora_lite/model/conversion.py",),
        lambda: _converter().target_patterns == ["c"],
    ),
    "transformers.core_model_loading.MergeModulelist": (
        ("qlora_lite/model/conversion.py",),
        lambda: _converter().operations[0].dim == 0,
    ),
    "transformers.core_model_loading.Concatenate": (
        ("qlora_lite/model/conversion.py",),
        lambda: _converter().operations[1].dim == 1,
    ),
    "transformers.utils.chat_template_utils.render_jinja_template": (
        ("qlora_lite/data/jinja_templates.py",),
        lambda: _render()[0] == ["xa"] and [tuple(span) for span in _render()[1][0]] == [(1, 2)],
    ),
    "os._exit": (  # documented, in spite of its name
        (
            "qlora_lite/foundation/interrupts.py",
            "qlora_lite/foundation/processes.py",
            "qlora_lite/training/interruption.py",
        ),
        lambda: _takes(os._exit, 130),
    ),
    "._lazy_init_hp_params_optimizer_state": (
        ("qlora_lite/training/zero_engine.py",),
        lambda: _takes(DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state, None),
    ),
    "transformers.configuration_utils.PretrainedConfig": (
        (
            "qlora_lite/model/config.py",
            "qlora_lite/model/config_sizes.py",
            "qlora_lite/model/facts.py",
            "qlora_lite/model/gguf/config.py",
            "qlora_lite/model/gguf/names.py",
            "qlora_lite/model/load.py",
            "qlora_lite/model/shape.py",
            "qlora_lite/run/loading.py",
        ),
        lambda: _is_public("configuration_utils", "PretrainedConfig"),
    ),
    "transformers.modeling_utils.PreTrainedModel": (
        ("qlora_lite/model/load.py",),
        lambda: _is_public("modeling_utils", "PreTrainedModel"),
    ),
    "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS": (
        ("qlora_lite/model/gguf/rope.py",),
        lambda: _takes(
            transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"],
            transformers.LlamaConfig(),
            torch.device("cpu"),
        ),
    ),
    "transformers.integrations.gguf.gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS": (
        ("qlora_lite/model/gguf/tokenizer.py",),
        lambda: "qwen2" in gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS,
    ),
    "transformers.integrations.gguf.gguf_tokenizer_mapping.convert_gguf_tokenizer": (
        ("qlora_lite/model/gguf/tokenizer.py",),
        lambda: _takes(gguf_tokenizer_mapping.convert_gguf_tokenizer, "llama", {}),
    ),
    "transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES": (
        ("qlora_lite/model/facts.py",),
        lambda: "bert" in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    ),
    "transformers.pytorch_utils.Conv1D": (
        (
            "qlora_lite/model/linears.py",
            "qlora_lite/model/load.py",
            "qlora_lite/model/shape.py",
        ),
        lambda: transformers.pytorch_utils.Conv1D(3, 2).weight.shape == (2, 3),
    ),
}
"""Name, as the source is scanned; the files that use it; what must hold."""


def test_the_table_names_what_the_source_uses_and_nothing_else():
    used = defaultdict(set)
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    inherited = {f"self.{name}" for tree in trees.values() for name in _defined(tree)}
    for file, tree in trees.items():
        own = inherited | set(_defined(tree))
        for name in _private_names(tree, own):
            used[name].add(file.relative_to(ROOT).as_posix())
    assert used == {name: set(files) for name, (files, _) in TABLE.items()}


@pytest.mark.parametrize("name", TABLE)
def test_it_exists_and_takes_what_is_passed(name):
    check = TABLE[name][1]
    assert check() is not False
    assert check() is not None


def test_eight_bit_adam_keeps_its_codes_and_their_map_under_the_names_that_are_reset():
    # training/optimizer.py zeroes part of `state1` and `state2` by the code of 0 in their map
    parameter = nn.Parameter(torch.zeros(8192))
    parameter.grad = torch.zeros(8192)
    for kind in (bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.PagedAdamW8bit):
        optimizer = kind([parameter])
        assert _takes(optimizer.get_state_buffer, parameter, torch.uint8)
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    state = optimizer.state[parameter]
    for moment in ("1", "2"):
        assert state[f"state{moment}"].dtype == torch.uint8
        assert (state[f"qmap{moment}"] == 0).any()


def test_an_embedding_with_a_scale_keeps_it_where_it_is_read():
    # model/load.py reads `embed_scale` of the Gemma family
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    embedding = Gemma3TextScaledWordEmbedding(4, 2, 0, embed_scale=2.0)
    assert float(embedding.embed_scale) == 2.0


def test_a_model_names_its_ties_and_its_decoder():
    # model/load.py, model/head.py and export/ read these
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.base_model_prefix == "model"


def test_checkpointing_takes_a_context_function():
    # model/checkpointing.py knows by it whether a forward is the repetition
    assert _takes(checkpoint, print, use_reentrant=False, context_fn=print)


@pytest.mark.parametrize("library", ["torch", "transformers", "bitsandbytes"])
def test_a_library_of_which_private_names_are_used_has_an_upper_bound(library):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = [r for r in map(Requirement, project["dependencies"]) if r.name == library]
    assert any(bound.operator == "<" for bound in needed.specifier)


def _defined(tree: ast.AST) -> Iterator[str]:
    """Methods, fields and attributes that a file itself defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _private_names(tree: ast.AST, own: set[str]) -> set[str]:
    """Those of one file. `.name` is an attribute of a value whose type is not known."""
    modules, imported = _imports(tree)
    found = {name for name in imported.values() if _is_private(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *path = _dotted(node)
            if root in modules:
                found |= set(filter(_is_private, [".".join((modules[root], *path))]))
            elif root in imported:
                found |= set(filter(_is_hidden, [".".join((imported[root], *path))]))
            elif _is_hidden(node.attr) and not own & {node.attr, f"{root}.{node.attr}"}:
                found.add(f".{node.attr}")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _is_hidden(alias.name)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_STRING:
            name = ast.unparse(node.args[1]).removeprefix("f").strip("'\"")
            if isinstance(node.args[1], ast.JoinedStr) or _is_hidden(name):
                found.add(f".{name}")
    # of a.b.c, the walk finds a.b as well
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def _dotted(node: ast.expr) -> list[str]:
    """`a.b.c` as its parts; what is not a name in front is left out: `f(x).b` is `["", "b"]`."""
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def _imports(tree: ast.AST) -> tuple[dict[str, str], dict[str, str]]:
    """What `import` and what `from ... import` bind, each by its local name."""
    modules, imported = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                modules[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return modules, imported


def _is_private(name: str) -> bool:
    """A dotted name of another library that it does not promise to keep."""
    root, *path = name.split(".")
    is_deep = root in SUBMODULES_ARE_PRIVATE and len(path) > 1 and path[0].islower()
    return _is_hidden(name) or (is_deep and not name.startswith(PUBLIC))


def _is_hidden(name: str) -> bool:
    """A part starts with an underscore, or it is an operator that a library registered."""
    parts = [part for part in name.split(".") if part.startswith("_") and part[:2] != "__"]
    return not name.startswith("qlora_lite.") and (bool(parts) or name.startswith("torch.ops."))
