"""Where `qlora-lite` starts: Ctrl-C is handled before the commands are imported."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from qlora_lite.foundation.interrupts import interruptible
from qlora_lite.foundation.processes import end_process, is_launched_as_other


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, and exit with its status."""
    end_process(interruptible(lambda: _status(arguments), is_launched_as_other()))


def _status(arguments: Sequence[str] | None) -> int:
    from qlora_lite.cli.app import app
    from qlora_lite.cli.script import refuse_options_as_settings
    from qlora_lite.cli.several import one_of_several, require_one_process, without_local_rank
    from qlora_lite.cli.status import status_of

    def run() -> None:
        words = without_local_rank(sys.argv[1:] if arguments is None else arguments)
        with one_of_several():
            require_one_process(words)
            refuse_options_as_settings(words)
            app(words, standalone_mode=True)

    return status_of(run)
