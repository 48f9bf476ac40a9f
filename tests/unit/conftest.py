"""Unit tests compute with one thread each: several run at once, and threads that wait for a core spin."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before torch is imported; programs that tests start inherit it
