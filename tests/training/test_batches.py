import pytest
import torch

from nanodiff.data.images import Images
from nanodiff.errors import UserError
from nanodiff.rng import scramble, uniform
from nanodiff.training.batches import Batches, order


def numbered(n, **options):
    """n pictures of 2 x 2; the picture of place i has the level i. Read ahead by threads, as files are."""
    data = Images(torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2), **options)
    data.in_memory = False
    return data


def test_each_epoch_is_a_permutation_of_its_own():
    orders = [order(100, 3, epoch) for epoch in range(5)]
    assert all(torch.equal(o.sort().values, torch.arange(100)) for o in orders)
    assert len({tuple(o.tolist()) for o in orders}) == 5
    assert torch.equal(order(100, 3, 2), orders[2]) and not torch.equal(order(100, 4, 2), orders[2])


def test_the_stream_goes_through_epoch_after_epoch_without_gaps():
    batches = Batches(numbered(10), 4, seed=1)
    index = torch.cat([batches.get(step)[1] for step in range(15)])  # 60 places: six epochs of ten
    for epoch in range(6):
        assert torch.equal(index[10 * epoch:10 * epoch + 10], order(10, 1, epoch))
    assert batches.epoch_steps == len(batches) == 3


def test_any_step_can_be_asked_for_alone_so_resuming_needs_only_its_number():
    data = numbered(50, flip=True)
    straight = Batches(data, 8, seed=2, accumulate=2)
    expected = {(s, m): straight.get(s, m) for s in range(12) for m in range(2)}
    for workers in (0, 2):
        resumed = Batches(data, 8, seed=2, accumulate=2, workers=workers)
        for key in [(7, 1), (8, 0), (8, 1), (3, 0), (3, 1), (3, 1), (11, 0)]:  # mid-step, backwards, twice the same
            assert all(torch.equal(a, b) for a, b in zip(resumed.get(*key), expected[key]))


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_together_see_what_one_large_batch_sees(world, accumulate):
    n, batch = 64, 16 // accumulate
    data = Images(torch.randint(0, 256, (n, 1, 3, 3), dtype=torch.uint8), flip=True)
    one = Batches(data, 16, seed=4)
    for step in (0, 3, 5):
        x, index, position = (torch.cat(parts) for parts in zip(*(
            Batches(data, batch, 4, accumulate, rank, world).get(step, micro)
            for micro in range(accumulate) for rank in range(world))))
        assert torch.equal(position, torch.arange(16))
        assert torch.equal(index, one.get(step)[1]) and torch.equal(x, one.get(step)[0])


@pytest.mark.parametrize("n, batch", [(4, 5), (4, 16), (1, 2)])
def test_a_batch_larger_than_the_data_names_both_numbers_at_once(n, batch):
    with pytest.raises(UserError, match=f"batch of {batch} .* {n} pictures: give --batch {n}"):
        Batches(numbered(n), batch)


def test_a_batch_that_processes_cannot_share_equally_is_refused():
    with pytest.raises(UserError, match="--batch 7 cannot be divided among 2 processes; expected a multiple of 2, such as 8"):
        Batches(numbered(64), 7, world=2)


def test_a_batch_below_one_and_an_empty_data_set_are_refused():
    with pytest.raises(UserError, match="give --batch 1"):
        Batches(numbered(4), 0)
    with pytest.raises(UserError, match="empty"):
        Batches(Images(torch.zeros(0, 1, 2, 2, dtype=torch.uint8)), 1)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_four_pictures_are_enough_for_ten_steps(batch):
    batches = Batches(numbered(4), batch, accumulate=4)  # an effective batch of up to 16
    micro_batches = [batches.get(step, micro) for step in range(10) for micro in range(4)]
    assert all(x.shape == (batch, 1, 2, 2) for x, _, _ in micro_batches)
    counts = torch.cat([index for _, index, _ in micro_batches]).bincount(minlength=4)
    assert counts.tolist() == [10 * batch] * 4  # each picture equally often


@pytest.mark.parametrize("workers", [0, 3])
def test_no_number_is_drawn_from_the_global_generator(workers):
    state = torch.random.get_rng_state()
    batches = Batches(numbered(20, flip=True), 4, workers=workers)
    for step in range(12):
        batches.get(step)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_batch_lies_within_the_range_and_fills_it():
    x, _, _ = Batches(numbered(256), 256).get(0)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1


def test_an_error_in_a_background_thread_reaches_the_caller():
    class Broken(Images):
        def read(self, index, draw):
            raise UserError("a.png cannot be read")
    data = Broken(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    data.in_memory = False
    with pytest.raises(UserError, match="a.png"):
        Batches(data, 2, workers=2).get(0)


def test_threads_read_files_ahead_and_leave_pictures_in_memory_alone():
    data = numbered(8)
    assert Batches(data, 2, workers=2).pool is not None
    data.in_memory = True
    assert Batches(data, 2, workers=2).pool is None


def test_draws_are_those_of_splitmix64_and_evenly_spread():
    def reference(z):  # the paper's mixer in whole numbers of any size
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31
    for number in (0, 1, 12345, 2**63 - 1, 2**63, 2**64 - 1):
        assert int(scramble(number)) % 2**64 == reference(number)
    assert reference(0) == 0xE220A8397B1DCDAF  # the generator's published first output for seed 0
    u = uniform(7, torch.arange(200000))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003 and (u.histc(20, 0, 1) / 10000 - 1).abs().max() < 0.05
    other = uniform(8, torch.arange(200000))
    assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 0.01


def test_without_a_flip_nothing_is_drawn_and_the_pictures_are_the_same():
    pixels = torch.randint(0, 256, (20, 1, 3, 3), dtype=torch.uint8)
    plain, asked = Images(pixels), Images(pixels)
    asked.draws = True
    index, draw, position = Batches(plain, 8, seed=1, world=2, rank=1).plan(3)
    _, expected, places = Batches(asked, 8, seed=1, world=2, rank=1).plan(3)
    assert draw is None and torch.equal(expected, scramble(1, 3 * 8 + 4 + torch.arange(4)))
    assert position.tolist() == places.tolist() == [4, 5, 6, 7]
    for step in range(12):
        assert torch.equal(Batches(plain, 4, seed=1).get(step)[0], Batches(asked, 4, seed=1).get(step)[0])
