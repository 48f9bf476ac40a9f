"""Imported first by a rank, or by the process that ranks are forked from: loads the libraries, hides what they print.

If an import fails, everything that was printed goes to the terminal together with the exception.
"""

import os
import sys
import tempfile

with tempfile.TemporaryFile() as _output:
    _terminal = os.dup(2)
    os.dup2(_output.fileno(), 2)
    try:
        # Every job loads a tokenizer, for which transformers is imported, and a table of prompts (pyarrow with pandas).
        import pandas  # noqa: F401
        import pyarrow.compute  # noqa: F401

        # Optimizers import it at their first step: in every rank, if not in the process that ranks are forked from.
        import torch._dynamo  # noqa: F401
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

        import megatron_s2d.workflow.worker  # noqa: F401
    except BaseException:
        _output.seek(0)
        os.write(_terminal, _output.read())
        raise
    finally:
        sys.stderr.flush()
        os.dup2(_terminal, 2)
        os.close(_terminal)
