"""`python -m lcprune`: the same as the command `lcprune`."""

import sys

from lcprune.cli import main

sys.exit(main())
