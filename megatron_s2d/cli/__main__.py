"""``python -m megatron_s2d.cli``: the ``s2d`` command."""

import sys

from megatron_s2d.cli import main

sys.exit(main())
