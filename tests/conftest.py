"""Before anything loads torch: threads that wait for each other sleep instead of spinning.

Several engines and their tests share few cores; with spinning barriers each of them slows the others down twentyfold.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("KMP_BLOCKTIME", "0")
