"""Products of matrices on Intel's CPUs: a row's bits are the same however many rows stand beside it.

MKL multiplies few rows (up to 12 by 512 columns, on a Xeon with AMX) in kernels that add in another order, and a rank
has fewer rows than one process. In MKL's strict mode of "conditional numerical reproducibility" a row of any product
that was tried had the same bits beside none or 95 others, as fast as without. On other vendors' CPUs it is not asked
for; there four rows are enough (`MIN_TOKENS_PER_RANK` in `pipeline/gang.py`).
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

_MODE = {"MKL_CBWR": "AUTO,STRICT"}
CPUS = Path("/proc/cpuinfo")


def multiply_exactly(environment: MutableMapping[str, str] = os.environ, cpus: Path = CPUS) -> None:
    """Asks MKL for it. To be called before torch is imported; what the user has set stays.

    Args:
        cpus: Linux's description of the machine's CPUs; where there is none, nothing is asked for.
    """
    try:
        is_intel = "GenuineIntel" in cpus.read_text(errors="replace")
    except OSError:
        return
    if is_intel:
        for name, value in _MODE.items():
            environment.setdefault(name, value)
