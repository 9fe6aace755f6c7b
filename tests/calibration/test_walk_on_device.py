"""States, blocks, experts and the head on another device are the CPU's."""

import pytest
import torch
from far_device import both, drawn, same
from small_models import random_tokens, save_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbrx_quant.calibration.blocks.head import distance, draw_labels, head_gradients
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.states import States, new_states, open_states
from dbrx_quant.calibration.blocks.walk import route, turns
from dbrx_quant.runtime.kernels.device import CPU

K = 96
FAMILIES = ["dbrx", "qwen2 moe", "qwen3 moe", "llama tied and biased"]


def test_states_are_read_and_written_from_the_device(tmp_path):
    def compute(device):
        path = tmp_path / f"{device.type}.safetensors"
        with new_states(path, (4, 8, K)) as states:
            states[1:] = drawn(3, 8, K).to(device)
        read = open_states(path, device)
        coded = States.scratch(tmp_path, (4, K))
        coded[1:3] = drawn(2, K).to(device)
        assert coded[:].device == CPU
        chosen = read.flat[torch.tensor([9, 30])]
        assert read[:].device == read.part(slice(2))[0].device == chosen.device == device
        return [read[:], chosen, coded[:]]

    same(*both(compute))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_and_its_experts_are_the_cpus(tmp_path, family):
    folder, ids = save_model(tmp_path, family), random_tokens(6, 16)

    def compute(device):
        model = StreamedModel(folder, device)
        live, states = model.block(0), model.embed(ids)
        output, middle = torch.empty_like(states), torch.empty_like(states)
        found = [live.without_mlp(states)]
        if live.spec.experts is None:
            return [*found, live(states)[0], *live.with_middle(states)]
        x = torch.empty_like(states.flatten(0, 1))
        routing = route(live, states, output, x, middle)
        assert routing.x.device == routing.index.device == routing.weight.device == CPU
        assert routing.device == live.routing.device == device
        for turn in turns(routing, live.spec.experts):
            turn.add_to(output.flatten(0, 1), turn.narrowed(model))
            found += [*turn.others(), turn.whole().x]
        return [*found, output, middle, x, routing.index, routing.weight]

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        same(*both(compute))


def test_gradients_and_distances_of_the_head_are_the_cpus(tmp_path):
    folder, ids = save_model(tmp_path / "model", "dbrx"), random_tokens(6, 16)

    def compute(device):
        model, states = StreamedModel(folder, device), []
        for number in (0, 1):
            path = tmp_path / f"{device.type}-{number}"
            with new_states(path, (6, 16, 64)) as filled:
                filled[:] = drawn(6, 16, 64, seed=number)
            states.append(open_states(path, device))
        head, gradients = model.dense(model.architecture.head), torch.empty(96, 64)
        total = head_gradients(model, states[0].flat, gradients, head, seed=3)
        scores = distance(model, *states, head * 1.01, head, ids)
        labels = draw_labels(head.softmax(-1), torch.Generator().manual_seed(1))
        return [gradients, total.columns, total.total, scores, labels]

    with torch.no_grad():
        same(*both(compute))
