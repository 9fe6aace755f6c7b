"""The sum over a token's experts of which a device computes some and the host the others, at the same time.

Tokens and their routing are on the device. Their copies to the host go out first, then the device's own
experts are launched; the host waits for the copies alone and computes while the device does. Its sums go back
and are added to the device's, always in this order. On a GPU all copies go through pinned memory of torch's
allocator, which gives a piece out again only when the copy is done.

Axes: T tokens, E experts, D hidden, A experts per token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels.device import upload

# (x [T, D], index [T, A], weights [T, A]) → sums [T, D] of one side, all where that side is.
Share = Callable[[Tensor, Tensor, Tensor], Tensor]

PASS_TOKENS = 512  # that cross at once: bounds pinned memory


def numbering(count: int, own: Sequence[int]) -> Tensor:
    """The number of each of E = `count` experts among `own`, int64 [E + 1]; of others, and of E, their count.

    So both sides read the same routing: what is not theirs is "no expert" to them.
    """
    numbers = torch.full((count + 1,), len(own), dtype=torch.int64)
    numbers[list(own)] = torch.arange(len(own))
    return numbers


def experts_sum(
    x: Tensor, index: Tensor, weights: Tensor, device_share: Share | None, host_share: Share, numbers: Tensor
) -> Tensor:
    """The sums of both sides, [T, D] in x's dtype, on its device.

    Args:
        x: [T, D], on the device.
        index: [T, A], of all experts.
        weights: [T, A].
        device_share: of the device; None: it has no experts.
        host_share: of the host; gets x in fp32, and the index in its own numbers.
        numbers: the host's `numbering`.
    """
    sums = torch.empty_like(x)
    for first in range(0, x.shape[0], PASS_TOKENS):
        part = slice(first, first + PASS_TOKENS)
        sums[part] = _pass(x[part], index[part], weights[part], device_share, host_share, numbers)
    return sums


def _pass(
    x: Tensor, index: Tensor, weights: Tensor, device_share: Share | None, host_share: Share, numbers: Tensor
) -> Tensor:
    copies = Copies(x, index, weights)
    sums = torch.zeros_like(x) if device_share is None else device_share(x, index, weights)
    states, chosen, factors = copies.wait()
    own = numbers[chosen]
    if bool((own == numbers[-1]).all()):
        return sums
    theirs = upload(host_share(states.float(), own, factors), x.device)
    return torch.add(sums, theirs).to(x.dtype)  # in fp32, as the host's are


class Copies:
    """Tensors on their way to the host.

    Args:
        *tensors: all on one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cuda":
            self._copies = tuple(
                torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True)
                for one in tensors
            )
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._copies = tuple(one.cpu() for one in tensors)

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, when they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
