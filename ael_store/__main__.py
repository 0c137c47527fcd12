"""`python -m ael_store` is the same as `ael`."""

import sys

from ael_store.cli.main import main

sys.exit(main())
