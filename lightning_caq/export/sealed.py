"""Sealed files: safetensors with a description and a fingerprint of every byte, all checked before anything is used.

A header of safetensors takes some hundred bytes a tensor, more than the codes of many a layer. All numbers of one type
are therefore one tensor, one after the other, named after the type; the tensor ``index`` is a compressed JSON text with
the description, and name, type and shape of each tensor in their order. Files of format 1 had a tensor by each name and
the description in the header; they are read as well.

The header's metadata hold the SHA-256 of the whole file, taken with sixty-four zeros in the fingerprint's own place, so
no byte of header or tensors can change unseen. It tells damage and mix-ups; it is no signature, for whoever writes a
file can write its fingerprint too.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_caq.errors import PlanError

VERSION = 2
_KEY, _INDEX = "lightning_caq", "index"
_BLANK = "0" * 64


def write_sealed(path: str | Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors and what describes them into one file.

    Args:
        path: The file; its folder is made if there is none.
        description: Anything JSON can hold.
        tensors: Tensors by name.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> path = write_sealed(f"{tempfile.mkdtemp()}/net", {"kind": "test"}, {"w": torch.ones(2)})
        >>> read_sealed(path)
        ({'kind': 'test'}, {'w': tensor([1., 1.])})
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed(description, tensors))
    return path


def sealed(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes that ``write_sealed`` writes."""
    plain = {name: tensors[name].detach().cpu() for name in sorted(tensors)}
    by_type: dict[str, list[Tensor]] = {}
    for tensor in plain.values():
        by_type.setdefault(_type(tensor), []).append(tensor.flatten())
    table = [[name, _type(x), list(x.shape)] for name, x in plain.items()]
    index = json.dumps({"tensors": table, "description": description}, separators=(",", ":")).encode()
    stored = {_INDEX: torch.frombuffer(bytearray(zlib.compress(index, 9)), dtype=torch.uint8)}
    stored |= {name: torch.cat(parts) for name, parts in by_type.items()}
    payload = save_tensors(stored, {_KEY: json.dumps({"fingerprint": _BLANK, "version": VERSION})})
    return payload.replace(_BLANK.encode(), _digest(payload), 1)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def read_sealed(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that ``write_sealed`` wrote.

    Args:
        path: The file.

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
    if isinstance(version, int) and version > VERSION:
        raise PlanError(
            f"{path} has format {version}; this version of lightning-caq reads up to {VERSION}. Install a newer one."
        )
    if (
        not isinstance(fingerprint, str)
        or _digest(payload.replace(fingerprint.encode(), _BLANK.encode(), 1)) != fingerprint.encode()
    ):
        raise PlanError(f"{path} is damaged: its fingerprint is not that of its contents. Copy or save it again.")
    try:
        tensors = load_tensors(payload)
        return (description, tensors) if version == 1 else _opened(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise PlanError(f"{path} is damaged: {error}. Copy or save it again.") from error


def _opened(stored: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors by name, of what lies in a file."""
    index = json.loads(zlib.decompress(stored.pop(_INDEX).numpy().tobytes()))
    tensors, used = {}, dict.fromkeys(stored, 0)
    for name, kind, shape in index["tensors"]:
        start, count = used[kind], math.prod(shape)
        tensors[name] = stored[kind][start : start + count].reshape(shape).clone()
        used[kind] += count
    return dict(index["description"]), tensors


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
