"""Pretrain the embedded default: a small Llama that has read Python's own documentation.

    python tools/build_demo_base.py                # rebuilds base/ and data/ in qlora_lite/demo
    python tools/build_demo_base.py --out DIR --minutes 1

The text is `pydoc_data.topics` and the docstrings of the standard library, which every Python
installation carries, under the licence of Python.  The way of it:

    objects -> seen or held out -> documents -> tokenizer -> model -> files and a model card

One object in 26 is held out, chosen by the hash of its name.  Its docstring is in no document
that the tokenizer or the model sees, under no alias, and its first sentence stands in no other
text: an object whose first sentence also occurs elsewhere is never held out.  So the held-out rows
measure what fine-tuning taught, not what pretraining remembers.

With `--steps`, the same Python, libraries and number of threads give the same files, except for
the seconds on the card.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import pkgutil
import platform
import re
import sys
import time
import types
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STDLIB = Path(os.__file__).parent
DEMO = Path(__file__).resolve().parent.parent / "qlora_lite" / "demo"


# ------------------------------------------------------------------------------------------ objects


@dataclass(frozen=True)
class Documented:
    """A module, class, function or attribute of the standard library that has a docstring."""

    name: str
    kind: str
    header: str
    doc: str

    @property
    def text(self) -> str:
        """The pretraining document: what it is called, then what it is."""
        return f"{self.kind} {self.header}\n{self.doc}"


NEVER_IMPORTED = {
    *("antigravity", "this", "__hello__", "__phello__"),  # they open a browser, or print
    *("idlelib", "tkinter", "turtle", "turtledemo"),  # they need a display
    *("test", "lib2to3", "_pyrepl", "pydoc_data"),
}
"""Read from their source files only; the others are imported, for the names that users know."""

PLATFORM_MODULES = {"posixpath", "ntpath", "genericpath", "posix", "nt", "opcode"}
"""The same functions have better-known names in `os`, `os.path` and `dis`."""

NO_ROWS = {"test", "idlelib", "lib2to3", "turtledemo", *PLATFORM_MODULES}
"""Good for pretraining, but nobody asks what these do."""


def documented_objects() -> list[Documented]:
    """Every docstring of the standard library once, under the best of its names, sorted by name."""
    best: dict[str, Documented] = {}
    for found in [*from_imports(), *from_sources()]:
        key = plain(found.doc)
        if key and (key not in best or renown(found.name) < renown(best[key].name)):
            best[key] = found
    return sorted(best.values(), key=lambda found: (found.name, found.doc))


def renown(name: str) -> tuple[bool, bool, int, int, str]:
    """Sorts the names of one object: public ones first, then the short ones."""
    parts = name.split(".")
    is_private = any(part.startswith("_") for part in parts)
    return is_private, parts[0] in PLATFORM_MODULES, len(parts), len(name), name


def plain(text: str) -> str:
    """Text as it is compared: white space and case do not count."""
    return " ".join(text.split()).lower()


def from_imports() -> Iterator[Documented]:
    """What the importable modules define or list in `__all__`."""
    for home, module in importable_modules():
        prefix = "" if home == "builtins" else f"{home}."
        if isinstance(module.__doc__, str):
            yield Documented(home, "module", home, inspect.cleandoc(module.__doc__))
        exported = getattr(module, "__all__", ())
        for key, value in sorted(vars(module).items()):
            owner = getattr(value, "__module__", None) or ""
            if key in exported or owner.lstrip("_") == home or owner == home:
                yield from described(prefix + key, value, owner)


def importable_modules() -> Iterator[tuple[str, types.ModuleType]]:
    """The modules of the standard library that import here, with the name to know them by."""
    waiting = sorted(sys.stdlib_module_names - NEVER_IMPORTED)
    while waiting:
        name = waiting.pop(0)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                module = importlib.import_module(name)
        except ImportError:  # made for another platform, or built without a C library
            continue
        if not is_ours(module):
            continue
        yield name, module
        if hasattr(module, "__path__"):
            inside = (f"{name}.{entry.name}" for entry in pkgutil.iter_modules(module.__path__))
            waiting += [n for n in inside if not n.endswith(("__main__", ".test", ".tests"))]
    yield "os.path", os.path


def is_ours(module: types.ModuleType) -> bool:
    """False where an installed package has taken the place of a standard module (distutils)."""
    file = getattr(module, "__file__", None)
    return file is None or (STDLIB in Path(file).parents and "site-packages" not in file)


FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
ATTRIBUTES = (property, types.GetSetDescriptorType, types.MemberDescriptorType)


def described(name: str, value: object, owner: str) -> Iterator[Documented]:
    """The docstring of a function or attribute; of a class, also those of what its body defines."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    is_kind = isinstance(value, (type, *FUNCTIONS, *ATTRIBUTES))
    if not is_kind or owner.partition(".")[0] not in sys.stdlib_module_names:
        return
    is_attribute = isinstance(value, ATTRIBUTES)
    kind = "class" if isinstance(value, type) else "attribute" if is_attribute else "function"
    doc = value.__doc__
    if isinstance(doc, str):
        header = name if is_attribute else f"{name}{signature(value)}"
        yield Documented(name, kind, header, inspect.cleandoc(doc))
    if isinstance(value, type):
        for key, member in sorted(vars(value).items()):
            is_inner = getattr(member, "__qualname__", "").startswith(f"{value.__qualname__}.")
            if is_inner or not isinstance(member, type):
                yield from described(f"{name}.{key}", member, owner)


def signature(value: object) -> str:
    """`(a, b=None, *rest)`, or `()` where a function in C does not tell."""
    try:
        found = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):  # the last: a default that does not exist here
        return "" if isinstance(value, type) else "()"
    parameters = [
        parameter.replace(annotation=parameter.empty, default=portable(parameter.default))
        for parameter in found.parameters.values()
        if parameter.name != "self"
    ]
    shown = inspect.Signature(parameters, __validate_parameters__=False)
    return str(shown).replace("Ellipsis", "...")


def portable(default: object) -> object:
    """A default that reads the same everywhere, or an ellipsis: `os.environ` is a default too."""
    if default is None or default is inspect.Parameter.empty or type(default) in (bool, int):
        return default
    return default if type(default) is str and len(default) < 20 and "/" not in default else ...


def from_sources() -> Iterator[Documented]:
    """What the source files say: also nested functions, and modules that were not imported."""
    for file in sorted(STDLIB.rglob("*.py")):
        path = file.relative_to(STDLIB).with_suffix("")
        if "site-packages" in path.parts or path.parts[0] not in {*sys.stdlib_module_names, "test"}:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # the tests of the parser hold such files
            continue
        yield from written(".".join(part for part in path.parts if part != "__init__"), tree)


def written(name: str, node: ast.AST) -> Iterator[Documented]:
    """The docstring of this piece of source, then of the classes and functions in it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        parameters = ", ".join(a.arg for a in node.args.args if a.arg != "self")
        kind, header, doc = "function", f"{name}({parameters})", ast.get_docstring(node)
    elif isinstance(node, ast.Module | ast.ClassDef):
        kind = "module" if isinstance(node, ast.Module) else "class"
        header, doc = name, ast.get_docstring(node)
    else:
        doc = None
    if doc:
        yield Documented(name, kind, header, doc)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from written(f"{name}.{child.name}", child)
        else:
            yield from written(name, child)


# --------------------------------------------------------------------------------------------- rows


def first_sentence(doc: str) -> str | None:
    """What an object does in one sentence, or None if its docstring does not say so in plain words.

    >>> first_sentence("S.join(iterable) -> str\\n\\nConcatenate any number of strings.  Then ...")
    'Concatenate any number of strings.'
    """
    lines = [line.strip() for line in doc.strip().splitlines()]
    while lines and (not lines[0] or is_signature(lines[0])):
        lines = lines[1:]
    paragraph = " ".join(lines[: lines.index("")] if "" in lines else lines)
    paragraph = re.sub(r"^[\w.]+(\([^)]*\))? (--?|->) ", "", " ".join(paragraph.split()))
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!](?=\s|$)", paragraph)
    sentence = paragraph[: end.start()] if end else paragraph
    return f"{sentence[0].upper()}{sentence[1:]}." if is_telling(sentence) else None


def is_signature(line: str) -> bool:
    """A line such as `pow(x, y, z=None)`, `S.find(sub[, start]) -> int` or `Tuple(name, age)`."""
    return bool(re.match(r"^[\w.\[\]]+\([^)]*\)?[)\]]*\s*(->.*|:)?$", line.strip()))


def is_telling(sentence: str) -> bool:
    """Long enough to be worth learning, short enough for one line, and words rather than code."""
    letters = sum(c.isalpha() or c in " ,'-" for c in sentence)
    return (
        20 <= len(sentence) <= 180
        and len(sentence.split()) >= 4
        and sentence[0].isalpha()
        and sentence[-1] not in ":,;-("
        and sentence.count("(") == sentence.count(")")
        and letters >= 0.85 * len(sentence)
        and not re.search(
            r">>>|::|\s[-=~]{2,}|^Alias for field|^Return self|^Initialize self|^Created on",
            sentence,
        )
    )


Row = dict[str, list[dict[str, str]]]
"""A conversation: `{"messages": [{"role": ..., "content": ...}, ...]}`."""

QUESTIONS = {
    "function": (
        "What does {name} do?",
        "In Python, what does {name} do?",
        "What is {name} for?",
        "Describe {name} in one sentence.",
    ),
    "class": (
        "What is {name}?",
        "In Python, what is {name}?",
        "What is {name} for?",
        "Describe {name} in one sentence.",
    ),
    "module": ("What is the module {name} for?", "What does the module {name} offer?"),
    "attribute": ("What is {name}?", "What does {name} hold?"),
}


def draw(name: str, sides: int, purpose: str) -> int:
    """A number below `sides` that depends on nothing but the name and what it is drawn for."""
    digest = hashlib.sha256(f"{purpose}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % sides


def row(found: Documented, answer: str) -> Row:
    """One conversation of a question and its answer."""
    phrasings = QUESTIONS[found.kind]
    question = phrasings[draw(found.name, len(phrasings), "phrasing")].format(name=found.name)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@dataclass(frozen=True)
class Corpus:
    """The text and the rows, parted by what the model may see in pretraining."""

    documents: list[str]
    rows: list[Row]
    held_out_documents: list[str]
    held_out_rows: list[Row]


ONE_IN = 26
"""One object in so many is held out, of those that may be."""


def collect() -> Corpus:
    """Every text and every row on one of the two sides, or on none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from modules that will leave the library some day
        objects = documented_objects()
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    answers = usable_answers(objects)
    everything = "\n".join(plain(text) for text in [*topics.values(), *(o.doc for o in objects)])
    held_out = [
        found
        for found, answer in answers.items()
        if draw(found.name, ONE_IN, "split") == 0
        and everything.count(plain(answer).rstrip(".")) == 1
    ]
    names = {found.name for found in held_out}
    seen = [found for found in objects if found.name not in names]
    return Corpus(
        documents=[f"topic {name}\n{text}" for name, text in sorted(topics.items())]
        + [found.text for found in seen],
        rows=[row(found, answers[found]) for found in seen if found in answers],
        held_out_documents=[found.text for found in held_out],
        held_out_rows=[row(found, answers[found]) for found in held_out],
    )


def usable_answers(objects: Sequence[Documented]) -> dict[Documented, str]:
    """The first sentences of public objects: each name once, each sentence under its best name."""
    answers: dict[Documented, str] = {}
    taken: set[str] = set()
    for found in sorted(objects, key=lambda found: (renown(found.name), found.doc)):
        is_public = not renown(found.name)[0] and found.name.split(".")[0] not in NO_ROWS
        answer = first_sentence(found.doc) if is_public else None
        if answer and not taken & {plain(answer), found.name}:
            answers[found] = answer
            taken |= {plain(answer), found.name}
    return dict(sorted(answers.items(), key=lambda item: item[0].name))


# ---------------------------------------------------------------------------------------- tokenizer

PAD, BOS, EOS, USER, ASSISTANT = SPECIAL = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|user|>",
    "<|assistant|>",
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] | trim + '\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '<|user|>\\n' + message['content'] | trim + '\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' }}
        {%- generation %}{{- message['content'] | trim + eos_token }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- raise_exception('this template knows the roles system, user and assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
"""Content is trimmed, so that no token straddles the line break and the answer that is trained."""


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text comes back byte for byte.

    Digits stand alone, which helps small models to calculate.  llama.cpp calls this way of cutting
    text `smollm`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT * 2,
        clean_up_tokenization_spaces=False,
    )


# -------------------------------------------------------------------------------------------- model

CONTEXT = 512


@dataclass(frozen=True)
class Pretraining:
    """The recipe of the base model, as one-minute probes on two cores chose it.

    Held-out nats per byte after about 500,000 tokens each:

        hidden 192, 4 layers, vocabulary 2048, own head,  batch 8   1.78
        hidden 192, 5 layers, vocabulary 3072, tied head, batch 8   1.74
        hidden 192, 3 layers, vocabulary 3072, tied head, batch 4   1.64 (410,000 tokens)
        hidden 128, 4 layers, vocabulary 2048, own head,  batch 4   1.61
        hidden 128, 4 layers, vocabulary 3072, tied head, batch 4   1.57

    On a CPU, minutes are what is short: a smaller model that takes more and smaller steps learns
    more from them.
    """

    vocabulary: int = 3072
    hidden: int = 128
    mlp: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    tie: bool = True

    batch: int = 4
    lr: float = 4e-3
    lr_floor: float = 0.05
    warmup: float = 0.03
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0


def new_model(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights; every linear layer divides into blocks of 64."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=CONTEXT * 2,
        tie_word_embeddings=settings.tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)


def encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """bos, document, eos."""
    ids = tokenizer(list(documents), add_special_tokens=True, verbose=False)["input_ids"]
    return [[*document, tokenizer.eos_token_id] for document in ids]


def packed_batches(documents: Sequence[Sequence[int]], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless (batch, CONTEXT) ids: documents end to end, cut where a row is full.

    Every epoch has an order of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        for index in torch.randperm(len(documents), generator=generator).tolist():
            waiting += documents[index]
            while len(waiting) >= batch * CONTEXT:
                yield torch.tensor(waiting[: batch * CONTEXT]).view(batch, CONTEXT)
                waiting = waiting[batch * CONTEXT :]


def cosine(step: int, steps: int, settings: Pretraining) -> float:
    """The learning rate of one step: a linear warm-up, then half a cosine down to the floor."""
    warmup_steps = max(1, round(steps * settings.warmup))
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.lr_floor + (1 - settings.lr_floor) * fall)


@torch.no_grad()
def loss_per_token(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy in nats over all tokens but bos.

    Each document is read alone, up to CONTEXT tokens of it.
    """
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([document[:CONTEXT]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def optimizer_for(model: LlamaForCausalLM, settings: Pretraining) -> torch.optim.AdamW:
    """AdamW, with weight decay for the matrices inside the layers alone."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or ".layers." not in n]
    groups = [
        {"params": inside, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


@dataclass(frozen=True)
class Result:
    """What pretraining measured; the held-out loss is that of the values of the bf16 file."""

    settings: Pretraining
    parameters: int
    steps: int
    tokens: int
    seconds: float
    train_loss: float
    held_out_loss: float


def pretrain(
    model: LlamaForCausalLM,
    seen: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    steps: int,
    settings: Pretraining,
) -> Result:
    """Train in fp32, and print the held-out loss ten times on the way.

    The train loss of the result is the mean over the last tenth of the steps.
    """
    optimizer = optimizer_for(model, settings)
    batches = packed_batches(seen, settings.batch, settings.seed)
    losses: deque[float] = deque(maxlen=max(1, steps // 10))
    started = time.perf_counter()
    for step, ids in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, settings)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            train_loss = sum(losses) / len(losses)
            held_out_loss = loss_per_token(model, held_out)
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1}/{steps}  train {train_loss:.4f}  held-out {held_out_loss:.4f}  "
                f"{(step + 1) * ids.numel() / seconds:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
    tell_apart(model, [SPECIAL.index(USER), SPECIAL.index(ASSISTANT)], settings.seed)
    round_to_bf16(model)
    return Result(
        settings=settings,
        parameters=model.num_parameters(),
        steps=steps,
        tokens=steps * settings.batch * CONTEXT,
        seconds=seconds,
        train_loss=train_loss,
        held_out_loss=loss_per_token(model, held_out),
    )


def tell_apart(model: LlamaForCausalLM, ids: Sequence[int], seed: int) -> None:
    """Add a random vector of ordinary length to the embeddings of tokens never seen.

    With a tied head the softmax pushes all unseen rows the same way, until user and assistant look
    alike (cosine above 0.99).
    """
    rows = model.get_input_embeddings().weight.data
    length = rows.norm(dim=1).median()
    noise = torch.randn(len(ids), rows.shape[1], generator=torch.Generator().manual_seed(seed))
    rows[list(ids)] += noise / noise.norm(dim=1, keepdim=True) * length


def round_to_bf16(model: LlamaForCausalLM) -> None:
    """Keep fp32 tensors, with the values of the bf16 file: what is measured is what is saved."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def steps_in(minutes: float, model: LlamaForCausalLM, settings: Pretraining) -> int:
    """How many steps fit, by the time of six on random ids after two to warm up."""
    ids = torch.randint(len(SPECIAL), settings.vocabulary, (settings.batch, CONTEXT))
    started = time.perf_counter()
    for step in range(8):
        if step == 2:
            started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
    return max(1, round(minutes * 60 * 6 / (time.perf_counter() - started)))


# -------------------------------------------------------------------------------------------- files


def save_base(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights in bf16, configuration, tokenizer and chat template."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    written["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows this name too
    write(folder / "tokenizer_config.json", json.dumps(written, indent=2) + "\n")


def save_rows(file: Path, rows: Sequence[Row]) -> None:
    """One conversation a line."""
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def save_licence(folder: Path) -> None:
    """The licence of the text, as this Python carries it, and what it applies to."""
    folders = (STDLIB, STDLIB.parent, Path(sys.base_prefix))
    licence = next((f / "LICENSE.txt" for f in folders if (f / "LICENSE.txt").is_file()), None)
    if licence is None:
        raise SystemExit(
            "The LICENSE.txt of this Python is missing; the base may not be passed on without it. "
            "Use a Python from python.org, pyenv or conda."
        )
    write(folder / "LICENSE-PSF", licence.read_text(encoding="utf-8"))
    write(folder / "NOTICE", NOTICE.format(python=platform.python_version()))


def write(file: Path, text: str) -> None:
    """UTF-8 with the same line ends everywhere."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


NOTICE = """\
The tokenizer and the weights in this folder were trained on, and the rows in ../data quote from,
pydoc_data.topics and the docstrings of the standard library of Python {python}.

Copyright (c) 2001 Python Software Foundation; All Rights Reserved.

That text is used under the licence of Python, which is in the file LICENSE-PSF.  Changes: docstrings
were dedented and put under a line with the name of their object; in the rows they are cut to their
first sentence, begin with a capital letter and end with a full stop.
"""  # noqa: E501

CARD = """\
---
license: other
license_name: python-software-foundation-licence
license_link: LICENSE-PSF
language: en
pipeline_tag: text-generation
---

# The embedded default of qlora_lite

A Llama of {parameters:,} parameters that has read the documentation inside Python {python} and
nothing else.  It exists so that fine-tuning can be shown, and tested, on any machine without a
download.  It knows the tone of Python's docstrings; it knows no facts worth relying on.

| | |
|---|---|
| architecture | Llama: {layers} layers, hidden {hidden}, MLP {mlp}, {heads} query heads on {kv_heads} key-value heads, RoPE, RMSNorm, {head} head |
| weights | bf16, {megabytes:.2f} MB |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, digits one by one; any text comes back byte for byte |
| context | trained on {context} tokens; `max_position_embeddings` is {positions}, the second half unpractised |
| chat | `<|user|>` and `<|assistant|>`, a turn of the assistant ends in `<|eos|>`; not seen in pretraining |

## How it was made

`{command}`

| | |
|---|---|
| text | {documents:,} documents, {characters:,} characters, {unique_tokens:,} tokens |
| held out | {held_out:,} objects, their docstrings in no document |
| pretraining | {steps:,} steps of {batch} x {context} tokens: {tokens:,} tokens, {epochs:.1f} epochs |
| optimizer | AdamW in fp32, peak learning rate {lr:g}, cosine to {lr_floor:.0%}, warm-up {warmup:.0%}, weight decay {weight_decay:g} |
| time | {seconds:,.0f} seconds of pretraining on {threads} CPU thread(s) |
| final train loss | {train_loss:.4f} nats per token (perplexity {train_perplexity:.1f}), mean of the last tenth of the steps |
| final held-out loss | {held_out_loss:.4f} nats per token (perplexity {held_out_perplexity:.1f}), {held_out_bits:.3f} bits per byte; a uniform guess has {uniform:.2f} nats |
| made with | Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

The held-out loss is that of the documents of the held-out objects, each read alone, with the bf16
values of the file computed in fp32.

## The rows beside it

`../data/train.jsonl` has {train_rows:,} conversations, `../data/heldout.jsonl` has {held_out_rows:,}:
a question about an object of the standard library, and the first sentence of its docstring.  No
answer of the second file occurs in the pretraining text or in the first file.

## Licence

The text is Python's: see `NOTICE` and `LICENSE-PSF`.
"""  # noqa: E501


def card(
    base: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, result: Result, threads: int
) -> str:
    """The model card: what the base is, and what its making measured."""
    settings = result.settings
    held_out_tokens = sum(
        len(d[:CONTEXT]) - 1 for d in encode(corpus.held_out_documents, tokenizer)
    )
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out_documents)
    unique_tokens = sum(map(len, encode(corpus.documents, tokenizer)))
    return CARD.format(
        **asdict(settings),
        parameters=result.parameters,
        head="tied" if settings.tie else "own",
        megabytes=(base / "model.safetensors").stat().st_size / 1e6,
        context=CONTEXT,
        positions=CONTEXT * 2,
        command=f"python tools/build_demo_base.py --steps {result.steps} --threads {threads}",
        documents=len(corpus.documents),
        characters=sum(map(len, corpus.documents)),
        unique_tokens=unique_tokens,
        held_out=len(corpus.held_out_documents),
        steps=result.steps,
        tokens=result.tokens,
        epochs=result.tokens / unique_tokens,
        seconds=result.seconds,
        threads=threads,
        train_loss=result.train_loss,
        train_perplexity=math.exp(result.train_loss),
        held_out_loss=result.held_out_loss,
        held_out_perplexity=math.exp(result.held_out_loss),
        held_out_bits=result.held_out_loss * held_out_tokens / held_out_bytes / math.log(2),
        uniform=math.log(settings.vocabulary),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        train_rows=len(corpus.rows),
        held_out_rows=len(corpus.held_out_rows),
    )


def main() -> None:
    """Build the base and its rows, from the text of this Python to the model card."""
    asked = arguments()
    torch.set_num_threads(asked.threads)
    settings = Pretraining()
    corpus = collect()
    print(
        f"{len(corpus.documents):,} documents, {len(corpus.held_out_rows)} objects held out",
        flush=True,
    )
    tokenizer = train_tokenizer(corpus.documents, settings.vocabulary)
    model = new_model(settings, tokenizer)
    steps = asked.steps if asked.minutes is None else steps_in(asked.minutes, model, settings)
    result = pretrain(
        model,
        encode(corpus.documents, tokenizer),
        encode(corpus.held_out_documents, tokenizer),
        steps,
        settings,
    )
    base = asked.out / "base"
    save_base(base, model, tokenizer)
    save_licence(base)
    save_rows(asked.out / "data" / "train.jsonl", corpus.rows)
    save_rows(asked.out / "data" / "heldout.jsonl", corpus.held_out_rows)
    write(base / "README.md", card(base, corpus, tokenizer, result, asked.threads))
    print((base / "README.md").read_text(encoding="utf-8"))


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded default and make its rows.")
    parser.add_argument("--out", type=Path, default=DEMO, help="receives base/ and data/")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=3000, help="optimizer steps (3000)")
    length.add_argument("--minutes", type=float, help="about this long instead, by a measurement")
    # Measured on two cores: 2 threads are 1.5 times faster than 1 while nothing else runs, and 20
    # times slower while something does, for they wait for each other in a spin loop.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
