"""Models of which a GPU, played by the CUDA emulator, has a part: the CPU's own words, and what is where."""

import copy
import json

import pytest
import torch
from fake_gpu import pretend_gpu
from gpu_limits import room_for
from places import TINY
from quant_models import CONFIGS, build_quantized_folder, made_once, round_folder
from safetensors.torch import load_file

import oracles_ops as oracle
from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.hybrid import crossing
from dbrx_quant.runtime.kernels import bodies
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.model import experts as experts_module
from dbrx_quant.runtime.model.experts import QuantExperts
from dbrx_quant.runtime.model.linear import QuantLinear
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

pytestmark = pytest.mark.usefixtures("emulated", "gpu")
MIXTURES = ("dbrx", "mixtral", "qwen2 moe", "qwen3 moe")


@pytest.fixture
def gpu(monkeypatch, emulated):
    """Only while a model is loaded and run by `on_gpu`: the CPU's own answers are made before."""
    return lambda: pretend_gpu(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return round_folder(TINY, tmp_path_factory.mktemp("tiny") / "m")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_once(lambda name: build_quantized_folder(CONFIGS[name](), tmp_path_factory.mktemp("model")))


def split_model(folder, share, said=None, **options):
    return load_model(
        folder,
        gpu_memory=room_for(folder, share),
        dtype=torch.float32,
        notify=(lambda line: None) if said is None else said.append,
        **options,
    )


def greedy(model, ids, count):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )


def mixtures_of(model):
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


# ---- The same words ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_words(tiny):
    """A prompt and what the CPU alone makes of it."""
    ids = load_tokenizer(tiny)("with open(", return_tensors="pt")["input_ids"]
    with use_activations("float"):
        return ids, greedy(load_model(tiny), ids, 3)


@pytest.mark.parametrize("count", [0, 4, 12, 16])
def test_a_small_dbrx_says_the_same_with_any_number_of_experts_on_the_gpu(tiny, tiny_words, count, gpu):
    ids, words = tiny_words
    gpu()
    model = split_model(tiny, count / 16)
    assert [len(one.host_experts) for one in mixtures_of(model)] == [16 - count] * 2
    assert torch.equal(greedy(model, ids, 3), words)


def test_the_host_may_round_activations_as_it_does_alone(tiny, tiny_words, gpu):
    ids, words = tiny_words
    gpu()
    with use_activations("int16"):
        assert torch.equal(greedy(split_model(tiny, 0.25), ids, 3), words)


@pytest.mark.parametrize(("family", "share"), zip(MIXTURES, (0.3, 0.5, 0.7, 0.6), strict=True))
def test_every_family_gives_the_logits_of_the_cpu_alone(family, share, folders, gpu):
    folder = folders(family).path
    ids = torch.arange(6).view(2, 3) * 7 % 128
    expected = load_model(folder)(ids).logits
    gpu()
    model = split_model(folder, share)
    assert all(0 < len(one.host_experts) < one.num_experts for one in mixtures_of(model))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


# ---- What is where ----------------------------------------------------------------------------------------


def test_the_busiest_experts_are_on_the_gpu_by_the_measurement_beside_the_shards(folders, tmp_path, gpu):
    folder = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "m").path
    shares = [0.4, 0.1, 0.3, 0.2]
    listed = [{"tokens": 1, "share": share, "mean_weight": 0.5} for share in shares]
    coverage = {"0": listed, "1": listed[::-1]}
    (folder / "measurement.json").write_text(json.dumps({"coverage": coverage}))
    gpu()
    said = []
    model = split_model(folder, 0.55, said)
    assert [one.host_experts for one in mixtures_of(model)] == [(1, 3), (0, 2)]
    assert "2 of 4 in every block; " in said[1]
    assert "% of what a token reads of experts, by measurement.json" in said[1]


def test_the_gpu_holds_tiles_and_the_host_the_files_own_tensors_once(folders, gpu):
    made = folders("mixtral")
    gpu()
    model = split_model(made.path, 0.5)
    held = 0
    for name, linear in model.named_modules():
        if isinstance(linear, QuantLinear):
            on_host = linear.stays
            assert linear.stored().tiled != on_host
            held += on_host
            if on_host:
                assert oracle.first_difference(linear.q_weight, made.tensors[stored_name(name)]) is None
    assert held == 3 * sum(len(one.host_experts) for one in mixtures_of(model))
    assert type(model.get_input_embeddings()).__name__ == "HostEmbedding"


def stored_name(module):
    return f"{module.replace('mlp.experts', 'block_sparse_moe.experts')}.q_weight"


def test_moving_a_model_leaves_what_is_on_the_host_where_it_is(folders, gpu):
    gpu()
    model = split_model(folders("dbrx").path, 0.5)
    kept = {id(t) for m in model.modules() if isinstance(m, QuantLinear) and m.stays for t in m.buffers()}
    table = model.get_input_embeddings().weight
    model.to(torch.bfloat16).to("cpu").to(torch.bfloat16)
    still = {id(t) for m in model.modules() if isinstance(m, QuantLinear) and m.stays for t in m.buffers()}
    assert kept == still
    assert model.get_input_embeddings().weight is table
    assert model.get_input_embeddings()(torch.tensor([3])).dtype == torch.bfloat16


def test_only_the_hosts_experts_come_out_of_the_repacked_file(folders, tmp_path, gpu):
    folder = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "m").path
    gpu()
    said = []
    with use_activations("int16"):
        before = set(bodies._bodies)
        room = 90_000  # for some of the host's experts, of which the rest is mapped
        model = split_model(folder, 0.3, said, memory=room)
        given = len(set(bodies._bodies) - before)
        model(torch.arange(6)[None])
    assert given == 3 * sum(len(one.host_experts) for one in mixtures_of(model))
    assert "stay in memory" in said[-1]


def test_memory_for_the_hosts_part_may_be_too_little(folders, gpu):
    gpu()
    with use_activations("int16"), pytest.raises(ValueError, match=r"memory: .* are too little"):
        split_model(folders("dbrx").path, 0.3, memory=1000)


# ---- State dictionaries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_a_split_model_is_saved_as_it_was(family, folders, tmp_path, gpu):
    made = folders(family)
    names = set(load_model(made.path).state_dict())
    gpu()
    model = split_model(made.path, 0.5)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert oracle.first_difference(saved[name], tensor) is None, name


def test_a_split_model_takes_a_state_and_can_be_copied(folders, gpu):
    gpu()
    model = split_model(folders("dbrx").path, 0.5)
    ids = torch.arange(2)[None]
    before = model(ids).logits
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, before)
    state = {n: ~t if n.endswith("q_weight") and "experts" in n else t for n, t in model.state_dict().items()}
    other.load_state_dict(state)
    assert not torch.equal(other(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


# ---- At the same time -------------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch):
    """What happens in a sum of experts, in order."""
    seen = []

    def watched(owner, name, text):
        inner = getattr(owner, name)

        def outer(*arguments):
            seen.append((text, len(arguments[0]) if isinstance(arguments[0], torch.Tensor) else None))
            return inner(*arguments)

        monkeypatch.setattr(owner, name, outer)

    class Watched(crossing.Copies):
        def __init__(self, *tensors):
            seen.append(("copies go out", len(tensors[0])))
            super().__init__(*tensors)

        def wait(self):
            seen.append(("host waits for them", None))
            return super().wait()

    def watch():
        watched(experts_module, "experts_op", "device starts")
        watched(experts_module, "host_experts_op", "host computes")
        watched(crossing, "upload", "sums go back")
        monkeypatch.setattr(crossing, "Copies", Watched)
        return seen

    return watch


def test_the_device_starts_before_the_host_computes_and_sums_come_back_after(folders, gpu, events):
    gpu()
    model = split_model(folders("dbrx").path, 0.5)
    seen = events()
    (first, _) = mixtures_of(model)
    x = torch.randn(3, 64)
    routing = torch.tensor([[first.host_experts[0], first.device_experts[0]]] * 3), torch.rand(3, 2)
    first(x, *routing)
    order = ["copies go out", "device starts", "host waits for them", "host computes", "sums go back"]
    assert [text for text, _ in seen] == order


def test_a_token_without_experts_on_the_host_brings_nothing_back(folders, gpu, events):
    gpu()
    first = mixtures_of(split_model(folders("dbrx").path, 0.5))[0]
    seen = events()
    own = first.device_experts
    first(torch.randn(1, 64), torch.tensor([[own[0], own[1]]]), torch.rand(1, 2))
    assert "host computes" not in [text for text, _ in seen]


def test_a_long_prompt_crosses_in_passes(folders, gpu, events, monkeypatch):
    gpu()
    model = split_model(folders("dbrx").path, 0.5)
    ids = torch.arange(20)[None]
    expected = model(ids).logits
    monkeypatch.setattr(crossing, "PASS_TOKENS", 8)
    seen = events()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert [count for text, count in seen if text == "copies go out"] == [8, 8, 4] * 2
    assert max(count for text, count in seen if text == "host computes") == 8


def test_a_split_model_answers_alike_every_time(folders, gpu):
    gpu()
    model = split_model(folders("qwen3 moe").path, 0.5)
    ids = torch.arange(4)[None]
    first = model(ids).logits
    assert all(torch.equal(model(ids).logits, first) for _ in range(2))
    assert not model.hf_quantizer.is_compileable
