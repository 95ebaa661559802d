"""`python -m gptoss COMMAND`, the same as the command `gptoss`."""

import sys

if __name__ == "__main__":  # multiprocessing's children import this module too
    from gptoss.cli.main import main

    sys.exit(main())
