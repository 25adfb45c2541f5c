"""The ISO standard's software as a peer: ``nncodec`` (ISO/IEC 15938-17), dependent quantization and its own coder.

It asks for an older numpy than this project's, and works with the newer one:
``pip install --no-deps nncodec && pip install h5py ptflops pandas opencv-python-headless``.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import tempfile
from typing import Any

import torch
from torch import nn

_COARSEST, _FINEST = -4, -40  # its quantization parameter; a lower one is finer


def installed() -> bool:
    return importlib.util.find_spec("nncodec") is not None


def coded_network(network: nn.Module, ratio: float) -> tuple[nn.Module, int]:
    """The network with its matrices coded and decoded, at the finest parameter that meets a ratio, and its bytes.

    Biases and norms stay as they are and are not counted, as for the networks that it is compared with.
    """
    weights = {name: p.detach().numpy() for name, p in network.named_parameters() if p.ndim > 1}
    limit = 4 * sum(w.size for w in weights.values()) / ratio
    for parameter in range(_FINEST, _COARSEST):
        stream = _encoded(weights, parameter)
        if len(stream) <= limit:
            break
    else:
        raise ValueError(f"nncodec: no parameter up to {_COARSEST} meets a ratio of {ratio:g}")
    made = copy.deepcopy(network)
    with contextlib.redirect_stdout(io.StringIO()):
        import nncodec.nn

        decoded = nncodec.nn.decode(stream, {"verbose": False})
    made.load_state_dict({name: torch.as_tensor(w) for name, w in decoded.items()}, strict=False)
    return made, len(stream)


def _encoded(weights: dict[str, Any], parameter: int) -> bytearray:
    import nncodec.nn

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = {"qp": parameter, "results": folder, "verbose": False}
        stream: bytearray = nncodec.nn.encode(dict(weights), settings)  # what its decoder takes
        return stream
