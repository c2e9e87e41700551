"""``python -m llmframe``: the command of this interpreter, whatever the PATH of a scheduler holds."""

import sys

from llmframe.cli import main

if __name__ == "__main__":
    sys.exit(main())
