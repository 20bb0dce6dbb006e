"""train.py with a fault on rank 1, for test_checkpoint.py; started with torchrun.

FAULT=full_disk: the save after step 1 finds a full disk. FAULT=crash: step 1 raises.
"""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402  (needs the path)

original_save, original_prepare = train.Run.save, train.prepare


def save_on_full_disk(run):
    """Files may not grow past 50 kB: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.step == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    original_save(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def crash_in_step_1(*args):
    _, step = args[-1]  # key
    if step == 1:
        raise ZeroDivisionError("something broke on rank 1")
    return original_prepare(*args)


if os.environ["RANK"] == "1":
    if os.environ["FAULT"] == "full_disk":
        train.Run.save = save_on_full_disk
    else:
        train.prepare = crash_in_step_1
train.main()
