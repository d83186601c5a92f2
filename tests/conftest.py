"""What every test process needs, also where the suite runs in the background or beside others."""

import os
import signal

# two test processes share the cores: torch and BLAS must not start a thread per core in each
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# a shell starts its background jobs with SIGINT ignored, which they and their children inherit
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
