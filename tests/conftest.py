"""One thread a process: the tests' tensors are small, and several processes share the cores."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
