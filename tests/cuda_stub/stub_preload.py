"""Imported once by the process that ranks on the stub are forked from."""

from megatron_s2d.measure.rank_process import import_everything

import_everything()
