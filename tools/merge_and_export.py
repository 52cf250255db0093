"""The command `qlora-lite merge` as a script.

    python tools/merge_and_export.py RUN OUT [--base auto|trained|original] [--dtype bf16|fp16|fp32]

All options of `qlora-lite merge` work here.
"""

import sys

from qlora_lite.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
