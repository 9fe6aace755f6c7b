"""Hidden states on disk: 16 bits a value that keep their precision beside outliers, whole or not at all."""

import pytest
import torch

from dbrx_quant.calibration.blocks.states import States, new_states, open_states, scratch
from dbrx_quant.runtime.files.errors import CheckpointError


def written(path, states):
    with new_states(path, states.shape) as made:
        made.copy_(states)
        assert not path.exists(), "the name appears only when the states are complete"
    return open_states(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "s.safetensors"


def test_states_that_fit_16_bits_are_read_as_written(path):
    states = torch.arange(-12.0, 12.0).view(2, 3, 4)
    read = written(path, states)
    assert read.shape == (2, 3, 4)
    assert torch.equal(read[:], states)
    assert torch.equal(read[1], states[1])
    assert torch.equal(torch.stack(list(read)), states)
    assert torch.equal(read.part(slice(1, None))[:], states[1:])
    assert torch.equal(read.flat[torch.tensor([4, 0])], states.view(6, 4)[[4, 0]])


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_every_value_keeps_11_bits_beside_an_outlier(path, size):
    states = size * torch.randn(3, 50, 200, generator=torch.Generator().manual_seed(0))
    states[..., 7] *= 10_000
    read = written(path, states)[:]
    normal = states.abs() > states.abs().amax(-1, keepdim=True) * 2.0**-28
    assert normal.float().mean() > 0.99
    assert ((read - states).abs() <= 2.0**-11 * states.abs())[normal].all()
    assert ((read - states).abs() <= 2.0**-39 * states.abs().amax(-1, keepdim=True))[~normal].all()


def test_zeros_and_the_ends_of_float32_come_back(path):
    ends = torch.tensor([0.0, 2.0**-126, -(2.0**-140), 2.0**127, -(2.0**127) * 1.5])
    states = torch.stack([torch.zeros(5), *(end * torch.ones(5) for end in ends[1:])])
    assert torch.equal(written(path, states)[:], states)


def test_what_is_not_finite_stays_so(path):
    states = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [3.0, 4.0]])
    assert torch.isfinite(written(path, states)[:]).all(-1).tolist() == [False, False, True]


def test_writing_to_opened_states_does_not_reach_the_disk(path):
    read = written(path, torch.zeros(2, 4))
    read[0:1] = torch.ones(1, 4)
    assert read[0].sum() == 4
    assert open_states(path)[:].sum() == 0


def test_damaged_states_are_refused(path):
    written(path, torch.ones(2, 4))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged since it was written"):
        open_states(path)


def test_scratch_has_no_name_and_holds_states(tmp_path):
    plain, coded = scratch(tmp_path, (3, 4)), States.scratch(tmp_path, (3, 4))
    assert not list(tmp_path.iterdir())
    assert not plain.any()
    plain[1] = 2
    coded[1:2] = plain[1:2]
    assert torch.equal(coded[:], plain)
    assert scratch(tmp_path, (0, 4)).shape == (0, 4)


def test_a_failure_leaves_no_file(path):
    with pytest.raises(RuntimeError), new_states(path, (4, 4)):
        raise RuntimeError
    assert not list(path.parent.iterdir())


def test_a_full_disk_is_said_before_anything_is_computed(path):
    full = pytest.raises(OSError, match="disk full: 4398046511104 bytes")
    with full, new_states(path, (1, 1 << 40)):  # 4 TiB
        pass
    assert not list(path.parent.iterdir())
