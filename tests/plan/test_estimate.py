"""Seconds from work and chip."""

import math

import pytest

from mim_jax.parallel.topology import Chip
from mim_jax.plan import estimate, hlo
from mim_jax.plan.collectives import Collective
from mim_jax.plan.costs import Work

TPU = Chip('t', 'tpu', flops=1000.0, clock=10.0, hbm=1e9, bandwidth=100.0, link=40.0, links=4, network=1.0, island=8)
GPU = Chip('g', 'cuda', flops=1000.0, clock=10.0, hbm=1e9, bandwidth=100.0, link=40.0, network=1.0, island=8)


def work(flops=0.0, size=0.0, cycles=0.0, kind='compiler'):
  return Work(hlo.Instruction('i', (), 'fusion', (), '', '', False), 1, kind, flops, size, cycles)


def test_tpu_time_is_cycles_over_clock_and_a_kernel_counts_its_roofline():
  found = estimate.of(TPU, [work(2000, 100, cycles=50), work(500, 300, kind='kernel')], [])
  assert found.kernel_cycles == pytest.approx(30)  # 300 bytes at 100 a second, 10 cycles a second
  assert found.cycles == pytest.approx(80)
  assert found.seconds == pytest.approx(8)
  assert (found.compute, found.memory, found.kernels) == pytest.approx((2.5, 4.0, 5.0))


def test_tpu_time_holds_what_the_compiler_does_not_count():
  found = estimate.of(TPU, [work(0, 100, cycles=50), work(0, 200, kind='other'), work(0, 300, kind='beside')], [])
  assert (found.cycles, found.other_cycles) == pytest.approx((50, 20))
  assert found.seconds == pytest.approx(5 + 2)
  assert estimate.of(TPU, [work(0, 0, cycles=50), work(0, 900, kind='beside')], []).seconds == pytest.approx(9)


def test_gpu_time_is_the_roofline_of_every_operation():
  found = estimate.of(GPU, [work(2000, 100), work(500, 300)], [])
  assert found.seconds == pytest.approx(2 + 3)
  assert found.cycles == pytest.approx(50)


def test_hidden_collectives_cost_nothing_until_they_are_the_limit():
  waited = Collective('all-gather', 'fsdp', 8, 8, hidden=False, bytes=160)
  hidden = Collective('all-gather', 'fsdp', 8, 8, hidden=True, bytes=160)
  seconds = 160 * 7 / 8 / 40
  assert estimate.of(TPU, [work(cycles=100)], [hidden]).seconds == pytest.approx(10)
  assert estimate.of(TPU, [work(cycles=100)], [waited]).seconds == pytest.approx(10 + seconds)
  assert estimate.of(TPU, [work(cycles=10)], [waited, hidden]).seconds == pytest.approx(2 * seconds)


@pytest.mark.parametrize(
  ('kind', 'group', 'members', 'seconds'),
  [
    ('all-gather', 8, 8, 80 * 7 / 8 / 40),
    ('reduce-scatter', 8, 8, 80 * 7 / 8 / 40),
    ('all-reduce', 8, 8, 2 * 80 * 7 / 8 / 40),
    ('collective-permute', 8, 8, 80 / 10),
    ('all-reduce', 2, 1, 2 * 80 / 2 / 1),  # between two islands only
    ('all-reduce', 16, 8, 2 * 80 * 7 / 8 / 40 + 2 * 80 / 8 / 2 / 1),  # within, then an eighth of it between two
  ],
)
def test_collective_seconds(kind, group, members, seconds):
  assert estimate.collective_seconds(TPU, Collective(kind, 'fsdp', group, members, False, bytes=80)) == pytest.approx(
    seconds
  )


def test_a_chip_without_published_peaks_has_no_estimate():
  found = estimate.of(Chip('cpu', 'cpu'), [work(10, 10)], [])
  assert found.seconds is None
  assert found.cycles is None
  assert math.isinf(Chip('cpu', 'cpu').hbm)
