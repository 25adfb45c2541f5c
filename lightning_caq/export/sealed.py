"""Sealed files: safetensors with a description and a fingerprint of every byte, all checked before anything is used.

The description is JSON in the metadata of the safetensors header. Its first entry is the SHA-256 of the whole file,
taken with sixty-four zeros in the fingerprint's own place, so no byte of header or tensors can change unseen. It tells
damage and mix-ups; it is no signature, for whoever writes a file can write its fingerprint too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_caq.errors import PlanError

_KEY = "lightning_caq"
_BLANK = "0" * 64


def write_sealed(path: str | Path, version: int, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors and what describes them into one file.

    Args:
        path: The file; its folder is made if there is none.
        version: Version of the description's format.
        description: Anything JSON can hold.
        tensors: Tensors by name.

    Returns:
        The path.

    Example:
        >>> import tempfile, torch
        >>> path = write_sealed(f"{tempfile.mkdtemp()}/net", 1, {"kind": "test"}, {"w": torch.ones(2)})
        >>> read_sealed(path, newest=1)
        ({'version': 1, 'kind': 'test'}, {'w': tensor([1., 1.])})
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed(version, description, tensors))
    return path


def sealed(version: int, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes that ``write_sealed`` writes."""
    text = json.dumps({"fingerprint": _BLANK, "version": version, **description}, separators=(",", ":"))
    # Copies of their own: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    payload = save_tensors(copies, {_KEY: text})
    return payload.replace(_BLANK.encode(), _digest(payload), 1)


def read_sealed(path: str | Path, newest: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that ``write_sealed`` wrote.

    Args:
        path: The file.
        newest: The newest version of the format that is understood.

    Returns:
        The description and the tensors, on the CPU.

    Raises:
        PlanError: If the file cannot be read, is of another kind or of a newer format, or differs by any byte from
            what was written.
    """
    try:
        payload = Path(path).read_bytes()
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}.") from error
    description = _describe(payload, path)
    version, fingerprint = description.pop("version", None), description.pop("fingerprint", None)
    if isinstance(version, int) and version > newest:
        raise PlanError(
            f"{path} has format {version}; this version of lightning-caq reads up to {newest}. Install a newer one."
        )
    if (
        not isinstance(fingerprint, str)
        or _digest(payload.replace(fingerprint.encode(), _BLANK.encode(), 1)) != fingerprint.encode()
    ):
        raise PlanError(f"{path} is damaged: its fingerprint is not that of its contents. Copy or save it again.")
    try:
        return {"version": version, **description}, load_tensors(payload)
    except (SafetensorError, KeyError, ValueError) as error:
        raise PlanError(f"{path} is damaged: {error}. Copy or save it again.") from error


def _describe(payload: bytes, path: str | Path) -> dict[str, Any]:
    """The description in the header, before the fingerprint is checked."""
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or len(payload) < 8 + length:
        raise PlanError(f"{path} is truncated or no safetensors file: its header is not whole. Copy or save it again.")
    try:
        header = json.loads(payload[8 : 8 + length])
        end = max((int(x["data_offsets"][1]) for name, x in header.items() if name != "__metadata__"), default=0)
        text = header.get("__metadata__", {}).get(_KEY)
        description = None if text is None else dict(json.loads(text))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise PlanError(f"{path} is damaged: its header cannot be read. Copy or save it again.") from error
    if description is None:
        raise PlanError(f"{path} is no file of save_quantized: its header holds no description by lightning-caq.")
    if len(payload) < 8 + length + end:
        raise PlanError(
            f"{path} is truncated: it has {len(payload)} bytes of {8 + length + end}. Copy or save it again."
        )
    return description


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()
