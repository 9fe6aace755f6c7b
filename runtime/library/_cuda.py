"""The native CUDA library, and its statuses as exceptions.

It is built where a CUDA compiler is found. It loads on machines without a GPU: only its calls fail there.
"""

from dbrx_quant.runtime.library import _abi
from dbrx_quant.runtime.library._shared_library import SharedLibrary

LIBRARY = SharedLibrary(
    "libdbrxq_cuda.so",
    "dbrx-quant's CUDA library",
    "a CUDA compiler (nvcc)",
    "dbrxq_cuda_abi_version",
    _abi.CUDA_FUNCTIONS,
)

library = LIBRARY.get
load = LIBRARY.load
use = LIBRARY.use
why_unavailable = LIBRARY.why_unavailable


def check(status: int, what: str) -> None:
    """Raise for a status other than 0.

    Raises:
        RuntimeError: the device refused or failed.
        ValueError: an argument is not what dbrxq.h asks for.
    """
    if status == 0:
        return
    text = f"{what}: {library().dbrxq_cuda_status_text(status).decode()}"
    raise RuntimeError(text) if status >= _abi.CUDA_ERRORS else ValueError(text)
