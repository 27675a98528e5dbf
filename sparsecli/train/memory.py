"""Memory that a training step frees stays with the process for the next step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc's allocator reuse large blocks instead of giving them back to the system; others are left as they are.

    A step allocates the same tensors as the step before. The system clears every page that it hands out, which takes a
    tenth of a step where tensors are large.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(M_TRIM_THRESHOLD, LARGEST)
    mallopt(M_MMAP_MAX, 0)
