"""Loads the libraries in the process that ranks are forked from; what they print while loading is not for the terminal.

An exception still ends with everything that was printed.
"""

import os
import sys
import tempfile

with tempfile.TemporaryFile() as _printed:
    _terminal = os.dup(2)
    os.dup2(_printed.fileno(), 2)
    try:
        import megatron_s2d.workflow.worker  # noqa: F401
    except BaseException:
        _printed.seek(0)
        os.write(_terminal, _printed.read())
        raise
    finally:
        sys.stderr.flush()
        os.dup2(_terminal, 2)
        os.close(_terminal)
