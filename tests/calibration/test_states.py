"""Hidden states on disk appear whole or not at all."""

import pytest
import torch

from dbrx_quant.calibration.blocks.states import new_states, open_states


def test_states_written_are_the_states_read(tmp_path):
    with new_states(tmp_path / "s.npy", (2, 3, 4)) as states:
        states.copy_(torch.arange(24.0).view(2, 3, 4))
        assert not (tmp_path / "s.npy").exists(), "the name appears only when the states are complete"
    assert torch.equal(open_states(tmp_path / "s.npy"), torch.arange(24.0).view(2, 3, 4))


def test_writing_to_opened_states_does_not_reach_the_disk(tmp_path):
    with new_states(tmp_path / "s.npy", (4,)) as states:
        states.zero_()
    open_states(tmp_path / "s.npy").fill_(1)
    assert open_states(tmp_path / "s.npy").sum() == 0


def test_a_failure_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), new_states(tmp_path / "s.npy", (4,)):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path):
    wanted = (1 << 40,)  # 4 TiB
    full = pytest.raises(OSError, match="disk full: 4398046511104 bytes")
    with full, new_states(tmp_path / "s.npy", wanted):
        pass
    assert not list(tmp_path.iterdir())
