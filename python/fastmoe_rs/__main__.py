"""`python -m fastmoe_rs`."""

import sys

from .cli import main

sys.exit(main())
