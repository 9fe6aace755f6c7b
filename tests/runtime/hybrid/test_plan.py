"""Which experts a GPU holds, against every possible choice."""

import itertools
import random

import pytest

from dbrx_quant.runtime.hybrid.plan import resident_experts, traffic


def best_saving(budget, use, sizes):
    """The most bytes a token that any set of experts within the budget saves, by trying all of them."""
    values = [(use[b][e] * sizes[b][e], sizes[b][e]) for b in use for e in range(len(use[b]))]
    best = 0.0
    for chosen in itertools.product((False, True), repeat=len(values)):
        kept = list(itertools.compress(values, chosen))
        if sum(size for _, size in kept) <= budget:
            best = max(best, sum(value for value, _ in kept))
    return best


def drawn(seed, equal):
    source = random.Random(seed)
    experts = source.choice((2, 3, 4))
    blocks = range(3, 3 + source.choice((1, 2, 3)))
    use = {block: tuple(source.random() for _ in range(experts)) for block in blocks}
    sizes = {block: tuple(10 if equal else source.randint(5, 15) for _ in range(experts)) for block in blocks}
    total = sum(map(sum, sizes.values()))
    return source.randint(0, total + 5), use, sizes


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_of_equally_large_experts_saves_more(seed):
    budget, use, sizes = drawn(seed, equal=True)
    found = resident_experts(budget, use, sizes)
    assert sum(sizes[b][e] for b, own in found.items() for e in own) <= budget
    assert traffic(found, use, sizes) == pytest.approx(best_saving(budget, use, sizes))


@pytest.mark.parametrize("seed", range(12))
def test_of_experts_of_all_sizes_the_best_choice_saves_one_expert_more_at_most(seed):
    budget, use, sizes = drawn(seed, equal=False)
    found = resident_experts(budget, use, sizes)
    assert sum(sizes[b][e] for b, own in found.items() for e in own) <= budget
    largest = max(use[b][e] * sizes[b][e] for b in use for e in range(len(use[b])))
    best = best_saving(budget, use, sizes)
    assert best - largest <= traffic(found, use, sizes) <= best + 1e-9


def test_what_fits_beside_the_busiest_is_taken_too():
    found = resident_experts(25, {0: (0.9, 0.8, 0.1)}, {0: (20, 10, 5)})
    assert found == {0: (0, 2)}


def test_equally_busy_experts_are_spread_over_all_blocks():
    use = {block: (0.25,) * 16 for block in range(4)}
    sizes = {block: (10,) * 16 for block in range(4)}
    found = resident_experts(10 * 26, use, sizes)
    assert [len(own) for own in found.values()] == [7, 7, 6, 6]


def test_everything_or_nothing():
    use, sizes = {1: (0.5, 0.5), 2: (0.1, 0.9)}, {1: (3, 3), 2: (3, 3)}
    assert resident_experts(0, use, sizes) == {1: (), 2: ()}
    assert resident_experts(12, use, sizes) == {1: (0, 1), 2: (0, 1)}
    assert resident_experts(100, {}, {}) == {}
