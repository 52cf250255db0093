"""Every docstring of the standard library once, under the best of its names.

Modules are imported for their public names; source files are parsed too, for nested functions and
for modules that cannot be imported here.
"""

import ast
import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = Path(os.__file__).parent


@dataclass(frozen=True)
class Documented:
    """A module, class, function or attribute of the standard library that has a docstring."""

    name: str
    kind: str
    header: str
    doc: str

    @property
    def text(self) -> str:
        """The pretraining document: kind and name, then the docstring."""
        return f"{self.kind} {self.header}\n{self.doc}"


NEVER_IMPORTED = {
    *("antigravity", "this", "__hello__", "__phello__"),  # they open a browser, or print
    *("idlelib", "tkinter", "turtle", "turtledemo"),  # they need a display
    *("test", "lib2to3", "_pyrepl", "pydoc_data"),
}
"""Modules that are read only from their source files."""

PLATFORM_MODULES = {"posixpath", "ntpath", "genericpath", "posix", "nt", "opcode"}
"""Modules whose functions have better-known names in `os`, `os.path` and `dis`."""


def documented_objects() -> list[Documented]:
    """Every docstring of the standard library once, under the best of its names, sorted by name."""
    best: dict[str, Documented] = {}
    for found in [*from_imports(), *from_sources()]:
        key = plain(found.doc)
        if key and (key not in best or name_order(found.name) < name_order(best[key].name)):
            best[key] = found
    return sorted(best.values(), key=lambda found: (found.name, found.doc))


def name_order(name: str) -> tuple[bool, bool, int, int, str]:
    """Sort key for the names of one object: public names first, then short ones."""
    parts = name.split(".")
    is_private = any(part.startswith("_") for part in parts)
    return is_private, parts[0] in PLATFORM_MODULES, len(parts), len(name), name


def plain(text: str) -> str:
    """Normalised for comparison: white space and case are ignored."""
    return " ".join(text.split()).lower()


def from_imports() -> Iterator[Documented]:
    """Docstrings of what importable modules define or list in `__all__`."""
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
    """The modules of the standard library that can be imported here, by name."""
    waiting = sorted(sys.stdlib_module_names - NEVER_IMPORTED)
    while waiting:
        name = waiting.pop(0)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                module = importlib.import_module(name)
        except ImportError:  # for another platform, or built without a C library
            continue
        if not is_standard(module):
            continue
        yield name, module
        if hasattr(module, "__path__"):
            inside = (f"{name}.{entry.name}" for entry in pkgutil.iter_modules(module.__path__))
            waiting += [n for n in inside if not n.endswith(("__main__", ".test", ".tests"))]
    yield "os.path", os.path


def is_standard(module: types.ModuleType) -> bool:
    """False if an installed package replaces a standard module (distutils)."""
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
    """The docstring of a function, attribute or class, and those of the members of a class."""
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
    """`(a, b=None, *rest)`, or `()` if a C function has no signature."""
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
    """A default that is the same on every machine, or an ellipsis (`os.environ` is a default)."""
    if default is None or default is inspect.Parameter.empty or type(default) in (bool, int):
        return default
    return default if type(default) is str and len(default) < 20 and "/" not in default else ...


def from_sources() -> Iterator[Documented]:
    """Docstrings in source files: also nested functions, and modules that were not imported."""
    for file in sorted(STDLIB.rglob("*.py")):
        path = file.relative_to(STDLIB).with_suffix("")
        if "site-packages" in path.parts or path.parts[0] not in {*sys.stdlib_module_names, "test"}:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # test files of the parser
            continue
        yield from written(".".join(part for part in path.parts if part != "__init__"), tree)


def written(name: str, node: ast.AST) -> Iterator[Documented]:
    """The docstring of an AST node, then those of the classes and functions in it."""
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
