"""Which requests are decoded together, in which shapes. Pure Python.

XLA compiles one program per shape, so prompt lengths and batch sizes are rounded up to a few sizes. Requests are sorted
by length before they are cut into batches, so that a batch pads little.
"""

from collections.abc import Iterator, Sequence

SMALLEST = 16  # tokens; below this, padding costs less than another compilation
HALVED = 96  # from here on there is a size between two powers of two


def length_bucket(length: int, longest: int) -> int:
    """The padded length: the next of 16, 32, 64, 96, 128, 192, 256, 384, ... that holds `length`, at most `longest`."""
    size = SMALLEST
    while size < length:
        size *= 2
    between = 3 * size // 4
    return min(between if between >= max(length, HALVED) else size, longest)


def batch_bucket(rows: int, largest: int, multiple: int = 1) -> int:
    """Rows of a batch for `rows` requests: the next power of two, but at most `largest` (more requests then need more
    batches), rounded up to `multiple` (of devices)."""
    size = min(1 << max(rows - 1, 0).bit_length(), largest)
    return -(-size // multiple) * multiple


def plan(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of requests, batch by batch: every index once, longest first.

    Longest first, so that too little memory shows in the first batch and not in the last. The last batch may be short;
    the caller pads it.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
