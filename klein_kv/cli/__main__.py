"""`python -m klein_kv.cli`."""

import sys

from klein_kv.cli.command import main

sys.exit(main())
