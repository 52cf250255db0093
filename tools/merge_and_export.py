"""The merge command as a script, for those who look for it here.

    python tools/merge_and_export.py RUN OUT [--base auto|trained|original] [--dtype bf16|fp16|fp32]

The same as `qlora-lite merge`, with the same options.
"""

import sys

from qlora_lite.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
