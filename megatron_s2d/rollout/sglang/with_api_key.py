"""Runs a module of SGLang as ``python -m`` does, with the API key of a file.

``python with_api_key.py KEY_FILE MODULE ...``. SGLang takes the key as an argument, which every user of the machine can
read in the list of processes, and writes its arguments to its log: here the argument is added inside the process, and
log records have asterisks in its place. The file imports nothing of this package: the interpreter of the servers may
be another one.
"""

import logging
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the module; its arguments are those after it and ``--api-key``."""
    file, module, *arguments = sys.argv[1:]
    key = Path(file).read_text().strip()
    if not key:
        sys.exit(f"Error: {file} has no API key")
    _hide_in_log_records(key)
    sys.argv = [module, *arguments, "--api-key", key]
    del sys.path[0]  # the directory of this file, whose modules are not to be imported by these names
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _hide_in_log_records(key: str) -> None:
    make = logging.getLogRecordFactory()

    def make_without_key(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # a record that does not fit its format: its handler reports that
            return record
        if key in message:
            record.msg, record.args = message.replace(key, "***"), ()
        return record

    logging.setLogRecordFactory(make_without_key)


if __name__ == "__main__":
    main()
