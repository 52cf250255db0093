"""Where `qlora-lite` starts: Ctrl-C is handled before the commands are imported."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from qlora_lite.foundation.interrupts import interruptible


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, and exit with its status."""
    sys.exit(interruptible(lambda: _status(arguments)))


def _status(arguments: Sequence[str] | None) -> int:
    from qlora_lite.cli.app import app
    from qlora_lite.cli.script import refuse_options_as_settings
    from qlora_lite.cli.status import status_of

    def run() -> None:
        refuse_options_as_settings(sys.argv[1:] if arguments is None else arguments)
        app(arguments)

    return status_of(run)
