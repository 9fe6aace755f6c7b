"""What the benchmark does besides timing: its random linears, and how it compares."""

from dbrx_quant.scripts.bench_kernels import FFN, HIDDEN, compare, mixed_groups, uniform_groups


def test_groups_cover_every_row_in_legal_order():
    for k in (HIDDEN, FFN):
        for groups in (mixed_groups(k), uniform_groups(k, 5, 128)):
            assert sum(rows for _, rows in groups) == k
            assert [bits for bits, _ in groups] == sorted((bits for bits, _ in groups), reverse=True)


def test_expert_linears_have_three_bits_a_weight():
    for k in (HIDDEN, FFN):
        groups = mixed_groups(k)
        code_bits = sum(bits * rows for bits, rows in groups)
        assert 2.95 < (code_bits + 4 * len(groups)) / k < 3.05


def test_the_comparison_takes_the_worst_of_threads_and_shapes():
    def rate(value, threads, **other):
        return {"k": 1, "n": 2, "threads": threads, "gweights_per_s": value} | other

    ours = [rate(90, 1, bits=4), rate(120, 2, bits=4), rate(60, 1, bits=3)]
    theirs = [rate(50, 1, type="Q4_K"), rate(100, 2, type="Q4_K"), rate(30, 1, type="Q3_K")]
    assert compare(ours, theirs) == {"4/Q4_K": 1.2, "3/Q3_K": 2.0}
