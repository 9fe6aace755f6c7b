"""What the benchmark does besides timing: its random linears, and how it compares."""

import torch
from quant_models import CONFIGS, build_quantized_folder

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.activations import use_activations
from dbrx_quant.scripts import bench_decode
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


def test_decoding_is_timed_in_parts_that_make_the_whole(tmp_path):
    folder = build_quantized_folder(CONFIGS["mixtral"](), tmp_path)
    model = load_model(folder.path)
    model.generation_config.eos_token_id = None
    threads, before = torch.get_num_threads(), set(vars(model.base_model.forward))
    try:
        with use_activations("int8"):
            row = bench_decode.measure(model, 1, tokens=4, runs=1)
    finally:
        torch.set_num_threads(threads)
    parts = row["ms"]
    total = parts.pop("total")
    assert parts.keys() == {"layers", "head", "python", "transformers"}
    assert min(parts.values()) > 0
    assert abs(sum(parts.values()) - total) < 1e-6
    assert set(vars(model.base_model.forward)) == before
    assert "forward" not in vars(model.lm_head)


def test_active_bytes_leave_out_the_experts_that_a_token_does_not_use(tmp_path):
    folder = build_quantized_folder(CONFIGS["mixtral"](), tmp_path)
    stored = {name: tensor.nbytes for name, tensor in folder.tensors.items() if ".q_" in name}
    experts = sum(size for name, size in stored.items() if ".experts." in name)
    expected = sum(stored.values()) - experts // 2  # 2 of 4
    assert abs(bench_decode.active_bytes(load_model(folder.path)) - expected) <= 2  # one rounding a layer
