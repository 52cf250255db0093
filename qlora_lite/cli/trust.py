"""`base.trust_remote_code=true` on the command lines that take no other settings.

The base's own Python code runs only if the command line or a Python recipe allows it. A run's
`recipe.json` cannot.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from qlora_lite.foundation.errors import RecipeError

TrustOnly = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="base.trust_remote_code=true",
        help="Run the base's own Python code. Read it first.",
        show_default=False,
    ),
]

_VALUES = {"true": True, "false": False}


def split_trust(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The other arguments, and whether `base.trust_remote_code=true` is among these.

    Raises:
        RecipeError: if its value is neither true nor false.
    """
    from qlora_lite.recipe_files import TRUST

    others, is_trusted = [], False
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if name != TRUST or not separator:
            others.append(argument)
        elif value.lower() in _VALUES:
            is_trusted = _VALUES[value.lower()]
        else:
            raise RecipeError(f"{TRUST}: got {value!r}, and true or false is needed")
    return others, is_trusted


def is_trusted(arguments: Sequence[str] | None) -> bool:
    """Whether `base.trust_remote_code=true` is given; nothing else is accepted.

    Raises:
        RecipeError: if there is any other argument.
    """
    from qlora_lite.recipe_files import TRUST

    others, allowed = split_trust(arguments or [])
    if others:
        raise RecipeError(
            f"got {' '.join(others)}, and this command takes no settings but {TRUST}=true. "
            "Leave it out"
        )
    return allowed
