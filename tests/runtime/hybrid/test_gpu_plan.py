"""What a GPU is planned to hold: no less than it holds, refused at the start where it does not fit, told."""

import ctypes
import json

import pytest
import torch
from far_device import FAR, far_device
from gpu_limits import CONTEXT, EVERYTHING, contents_of, room_for
from quant_models import CONFIGS, build_quantized_folder, made_once

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.hybrid import crossing, gpu_device
from dbrx_quant.runtime.hybrid.gpu_bytes import Batch, allocated, linear_bytes, workspace_bytes
from dbrx_quant.runtime.hybrid.gpu_plan import GpuMemory, plan_gpu
from dbrx_quant.runtime.kernels import cuda, cuda_tiles
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.library import _abi, _cuda, _gpus
from dbrx_quant.runtime.model.linear import QuantLinear

MIXTURES = ("dbrx", "mixtral", "qwen2 moe", "qwen3 moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_once(
        lambda name: build_quantized_folder(CONFIGS[name](), tmp_path_factory.mktemp("model")).path
    )


# ---- On a device that refuses the host's tensors ----------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "share"), [("dbrx", 0.0), ("dbrx", 1.0), *((family, 0.5) for family in MIXTURES)]
)
def test_no_tensor_of_the_host_meets_one_of_the_device(family, share, folders):
    folder = folders(family)
    ids = torch.arange(10).view(2, 5) * 7 % 128
    expected = load_model(folder)(ids).logits
    with far_device() as memory, torch.no_grad():
        limit = room_for(folder, share)
        model = load_model(
            folder, device=FAR, gpu_memory=limit, dtype=torch.float32, notify=lambda line: None
        )
        plan = plan_gpu(contents_of(folder), limit, None, 4)
        assert 0 < memory.now <= plan.common + plan.experts
        linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
        assert {linear.q_weight.device.type for linear in linears if linear.stays} <= {"cpu"}
        assert {linear.q_weight.device for linear in linears if not linear.stays} == {FAR}
        assert model.device == FAR
        logits = model(ids.to(FAR), use_cache=False).logits
        assert logits.device == FAR
        found = logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_has_come_back_to_the_cpu_computes_there(folders):
    ids = torch.arange(5)[None]
    expected = load_model(folders("dbrx"))(ids).logits
    with far_device():
        limit = room_for(folders("dbrx"), 0.5)
        model = load_model(
            folders("dbrx"), device=FAR, gpu_memory=limit, dtype=torch.float32, notify=lambda line: None
        )
        model.to("cpu")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


# ---- Bytes ------------------------------------------------------------------------------------------------


def test_memory_is_given_out_in_pieces():
    assert [allocated(count) for count in (1, 512, 513)] == [512, 512, 1024]
    assert allocated((10 << 20) + 1) == 12 << 20


def test_a_linear_takes_what_its_tiles_and_tables_take(emulated, folders):
    contents = contents_of(folders("dbrx"))
    for spec in contents.architecture.linears():
        stored = Stored.of(contents.checkpoint.linear(spec.name))
        tiled = stored._replace(q_weight=cuda_tiles.tile(stored))
        made = cuda_tiles.device_linear(tiled).made
        assert linear_bytes(contents, spec, 2) == sum(allocated(t.nbytes) for t in (*tiled, *made)), spec.name


@pytest.mark.parametrize("tokens", [1, 7, 40, 513])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_workspace_of_the_kernels_is_bounded_from_above(emulated, folders, tokens, dtype):
    contents = contents_of(folders("dbrx"))
    experts = contents.architecture.blocks[0].experts
    gate, up, down = (
        [Stored.of(contents.checkpoint.linear(linears[role].name)) for linears in experts.linears]
        for role in range(3)
    )
    lists = [cuda.StoredList([t for stored in role for t in stored]) for role in (gate, up, down)]
    block, size = cuda.expert_block(torch.empty(1, 64), *lists), ctypes.c_int64()
    status = _cuda.library().dbrxq_cuda_experts_workspace(
        ctypes.byref(block.struct), tokens, experts.active, _abi.DTYPES[dtype], ctypes.byref(size)
    )
    assert status == 0
    bound = workspace_bytes(contents.architecture, Batch(tokens, 1, dtype.itemsize))
    assert size.value < bound


# ---- Said and refused -------------------------------------------------------------------------------------


def lines_of(folder, share, **use):
    return list(plan_gpu(contents_of(folder), room_for(folder, share, 2), None, 2).lines())


def test_what_is_going_to_be_where_is_said(folders):
    planned, experts, host = lines_of(folders("dbrx"), 0.55)
    assert planned.startswith("GPU: 0.20 GB of 0.20 GB planned: 0.")
    assert f"for a cache of {CONTEXT} tokens" in planned
    assert planned.endswith("of workspace, the embedding in main memory")
    assert experts.startswith("experts on the GPU: 2 of 4 in every block; ")
    assert experts.endswith(
        "% of what a token reads of experts, if all are chosen alike: there is no measurement.json"
    )
    assert host.startswith("main memory: the other experts, 0.0")


def test_blocks_without_experts_are_not_counted(folders):
    assert "2 of 4 in every block; " in lines_of(folders("qwen3 moe"), 0.55)[1]


def test_uneven_numbers_are_told_block_by_block(folders):
    assert "experts on the GPU: 3 2 of 4 in blocks 0 to 1; " in lines_of(folders("mixtral"), 0.68)[1]


def test_a_model_that_fits_is_on_the_gpu_whole(folders):
    plan = plan_gpu(contents_of(folders("mixtral")), GpuMemory(EVERYTHING), 64, 2)
    assert plan.whole
    assert (plan.share, plan.host_bytes, plan.embedding, plan.context) == (1.0, 0, None, 64)
    assert len(list(plan.lines())) == 1


def test_the_share_is_that_of_the_measured_traffic(tmp_path):
    folder = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "m").path
    shares = [0.4, 0.1, 0.3, 0.2]
    listed = [{"tokens": 1, "share": share, "mean_weight": 0.5} for share in shares]
    (folder / "measurement.json").write_text(json.dumps({"coverage": {"0": listed, "1": listed}}))
    contents = contents_of(folder)
    plan = plan_gpu(contents, room_for(folder, 0.55, 2), None, 2)
    assert plan.device_experts == {0: (0, 2), 1: (0, 2)}
    read = {
        expert: sum(
            contents.checkpoint.info(f"{spec.name}.{suffix}").nbytes
            for block in contents.architecture.blocks
            for spec in block.experts.linears[expert]
            for suffix in Stored._fields
        )
        for expert in range(4)
    }
    total = sum(shares[expert] * count for expert, count in read.items())
    assert plan.share == pytest.approx((shares[0] * read[0] + shares[2] * read[2]) / total)
    assert plan.host_traffic == pytest.approx(2 * (shares[1] * read[1] + shares[3] * read[3]))


def test_too_little_is_refused_with_figures_and_the_way_out(folders):
    with pytest.raises(
        ValueError,
        match=r"gpu memory: 1\.00 MB are too little: what every token needs takes "
        r"0\.\d+ MB, a cache of 64 tokens .* in all; give that much, fewer tokens, or leave it out",
    ):
        load_model(folders("dbrx"), gpu_memory=10**6)


def test_a_model_without_experts_has_to_fit(folders):
    with pytest.raises(ValueError, match="the model, which has no experts to leave out, takes"):
        load_model(folders("llama"), gpu_memory=10**6)
    contents = contents_of(folders("llama"))
    assert plan_gpu(contents, GpuMemory(EVERYTHING, 64), None, 2).whole
    tied = contents_of(folders("llama tied and biased"))
    assert plan_gpu(tied, GpuMemory(EVERYTHING, 64), None, 2).whole


def test_without_a_gpu_it_is_refused(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_gpus, "why_no_gpu", lambda: "there is no driver")
    with pytest.raises(RuntimeError, match="device cuda: there is no driver"):
        load_model(folders("dbrx"), gpu_memory=10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda, "why_unavailable", lambda device: "there was no compiler")
    with pytest.raises(RuntimeError, match="device cuda: there was no compiler"):
        load_model(folders("dbrx"), gpu_memory=10**9)


def test_more_than_is_free_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda, "why_unavailable", lambda device: None)
    monkeypatch.setattr(gpu_device, "free_bytes", lambda device: 21 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(
        ValueError, match=r"22\.0 GB, but 21\.0 GB are free on cuda:1 \(RTX 3090\); give less"
    ):
        gpu_device.splitting_device(torch.device("cuda:1"), 22 * 10**9)
    assert gpu_device.splitting_device(torch.device("cpu"), 20 * 10**9) == torch.device("cuda")


def test_a_split_is_over_one_gpu_and_the_cpu(folders, monkeypatch):
    with pytest.raises(ValueError, match="one GPU and the CPU; name one device"):
        load_model(folders("dbrx"), gpu_memory=10**9, device_map="auto")
    monkeypatch.setattr(_cuda, "require_usable", lambda device: None)
    with pytest.raises(ValueError, match="one GPU and the CPU; name one device"):
        load_model(folders("dbrx"), gpu_memory=10**9, device="cuda:0,cuda:1")


# ---- The sum of both sides --------------------------------------------------------------------------------


def test_both_sides_read_one_routing():
    assert crossing.numbering(5, [1, 4]).tolist() == [2, 0, 2, 2, 1, 2]
    assert crossing.numbering(3, []).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_sum_of_two_shares_is_that_of_all_experts(tokens, seeded, monkeypatch):
    monkeypatch.setattr(crossing, "PASS_TOKENS", 4)
    matrices = torch.randn(5, 8, 8)
    own, other = [0, 3], [1, 2, 4]
    index = torch.randint(0, 6, (tokens, 3))  # 5: no expert
    x, weights = torch.randn(tokens, 8).half(), torch.rand(tokens, 3)

    def share(experts):
        def compute(x, index, weights):
            y = torch.zeros(len(x), 8)
            for t, a in ((t, a) for t in range(len(x)) for a in range(3)):
                if index[t, a] < len(experts):
                    y[t] += weights[t, a] * (matrices[experts[index[t, a]]] @ x[t].float())
            return y

        return compute

    numbers = crossing.numbering(5, own)
    device = share(own)
    found = crossing.experts_sum(
        x,
        index,
        weights,
        lambda x, i, w: device(x, numbers[i], w).half(),
        share(other),
        crossing.numbering(5, other),
    )
    exact = share([0, 1, 2, 3, 4])(x, index, weights)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact, rtol=2e-3, atol=2e-2)
    nothing = crossing.experts_sum(x, index, weights, None, share(range(5)), crossing.numbering(5, range(5)))
    torch.testing.assert_close(nothing.float(), exact, rtol=2e-3, atol=2e-2)
