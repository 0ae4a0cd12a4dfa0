"""How many calls are claimed before a worker is free for them. Pure.

A claim is a commit: without any in advance, a worker whose call has ended would wait for the disk. But what is claimed
when a process is killed counts as perhaps paid for, whether it was sent or not: so it is as much as ends while a claim
is committed, a few times over (some commits take longer), and no more.
"""

CLAIM = 256  # calls that are claimed together, at most
LEAST = 8
TIMES = 8


class Ahead:
    """The length of the queue of claimed calls.

    Args:
      width: calls in flight.

    Attributes:
      low: when no more than so many wait for a worker, the next ones are claimed.
    """

    def __init__(self, width: int) -> None:
        self.most = min(2 * width, 2 * CLAIM)
        self.low = min(width, self.most)

    def ended(self, count: int) -> None:
        """So many calls ended while the last claim was committed."""
        self.low = max(min(TIMES * count, self.most), self.low * 7 // 8, min(LEAST, self.most))

    def next(self, idle: int, queued: int) -> int:
        """How many to claim now: for workers that are idle, and for the queue."""
        return max(LEAST, min(CLAIM, idle + 2 * self.low - queued))
