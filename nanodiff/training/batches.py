"""The endless stream of training batches: a function of the step number, so that resuming needs nothing else.

The stream runs through the data again and again, each time in a new order. The picture at place p, its crop and its
flip follow from (seed, p) alone and do not depend on workers, ranks or earlier reads.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from nanodiff.errors import UserError
from nanodiff.rng import scramble
from nanodiff.training.distributed import share_of


@lru_cache(maxsize=4)
def order(n, seed, epoch):
    """The order of n pictures in pass `epoch`, a permutation int64 [n] that is cached: do not write into it."""
    generator = torch.Generator().manual_seed(int(scramble(seed, epoch)) & 0xFFFFFFFF)
    return torch.randperm(n, generator=generator)


class Batches:
    """Batches of a data set for every step, micro-batch and rank.

    data        a data set (see `nanodiff.data`)
    batch       pictures in one micro-batch of all ranks, which share them equally; at most len(data)
    accumulate  micro-batches in a step
    rank, world this process's number and how many there are
    workers     batches of files that background threads read ahead; 0 reads on demand. The results are the same.

    UserError when the batch is larger than the data set or cannot be shared equally.
    """

    def __init__(self, data, batch, seed=0, accumulate=1, rank=0, world=1, workers=0):
        if len(data) == 0:
            raise UserError("the data set is empty: at least one picture is needed")
        if not 1 <= batch <= len(data):
            raise UserError(f"a batch of {batch} cannot be drawn from a data set of {len(data)} pictures:"
                            f" give --batch {min(max(batch, 1), len(data))}")
        self.data, self.batch, self.share, self.seed = data, batch, share_of(batch, world), seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        # Pictures in memory need no thread: one beside torch's own made a training step 1.7 times slower.
        self.workers = workers = 0 if data.in_memory else workers
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="batches") if workers else None
        self.ahead = {}  # (step, micro) -> the future that reads it

    @property
    def epoch_steps(self):
        """Steps until every picture has been seen once, rounded up."""
        return -(-len(self.data) // (self.batch * self.accumulate))

    def __len__(self):
        return self.epoch_steps

    def plan(self, step, micro=0):
        """(index, draw, position) of a micro-batch, int64 [b] each: pictures, random draws, places in the step.

        draw is None when the data set draws nothing at random.
        """
        first = micro * self.batch + self.rank * self.share
        n, start = len(self.data), step * self.accumulate * self.batch + first  # in the stream
        epochs = range(start // n, (start + self.share - 1) // n + 1)
        index = torch.cat([order(n, self.seed, epoch)[max(0, start - epoch * n):start + self.share - epoch * n]
                           for epoch in epochs])
        draw = None  # saves some thirty operations on the batch, a hundredth of a small network's step
        if getattr(self.data, "draws", True):
            draw = scramble(self.seed, torch.arange(start, start + self.share))
        return index, draw, torch.arange(first, first + self.share)

    def get(self, step, micro=0):
        """(x, index, position): float32 [b,C,H,W] in [-1, 1], int64 [b] into the data set, int64 [b] in the whole step.

        position counts 0 .. accumulate * batch - 1: seed a sample's noise by (seed, step, position).
        """
        if self.workers == 0:
            return self._read(step, micro)
        batch = self.ahead.pop((step, micro), None)
        if batch is None:  # a jump, e.g. a resumed run: the batches read ahead are useless
            for future in self.ahead.values():
                future.cancel()
            self.ahead = {}
            batch = self.pool.submit(self._read, step, micro)
        for _ in range(self.workers):
            step, micro = (step, micro + 1) if micro + 1 < self.accumulate else (step + 1, 0)
            if (step, micro) not in self.ahead:
                self.ahead[step, micro] = self.pool.submit(self._read, step, micro)
        return batch.result()

    def _read(self, step, micro):
        index, draw, position = self.plan(step, micro)
        return self.data.read(index, draw), index, position
