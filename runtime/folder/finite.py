"""Values that are not finite in the 16-bit tensors of a checkpoint: one of them makes every output NaN."""

from dbrx_quant.runtime.exl2.finite import first_not_finite
from dbrx_quant.runtime.exl2.format import TENSORS
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import Contents


def check_finite(contents: Contents) -> None:
    """Refuse NaN and infinity in norms, embedding, routers and all else that is not quantized.

    Scales and biases of linears were checked with the linears.

    Raises:
        CheckpointError: names the first such value.
    """
    for name in contents.names:
        linear, _, suffix = name.rpartition(".")
        if suffix not in TENSORS or not contents.checkpoint.is_quantized(linear):
            found = first_not_finite(contents.checkpoint, name)
            if found:
                where = f"{contents.checkpoint.info(name).file}: {name}"
                raise CheckpointError(f"{where}: {found}, expected finite values")
