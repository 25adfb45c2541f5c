"""The network, saved: the files that a quantized network is loaded from, and the lines that load it."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_caq.bridge.calibration import training_batches
from lightning_caq.bridge.folders import log_folder, unused
from lightning_caq.errors import OptionError
from lightning_caq.export.onnx import PACKAGES, export_onnx
from lightning_caq.export.packed import OtherType, check_other_dtype, save_quantized
from lightning_caq.network.arguments import possible_arguments

NETWORK, CHECKPOINT, ONNX = "network.safetensors", "quantized.ckpt", "network.onnx"


@dataclass(frozen=True)
class Saving:
    """What of a quantized network is written when it is made.

    Attributes:
        save: Whether to write the packed file and the checkpoint.
        export: ``"onnx"`` writes that too.
        other_dtype: What statistics and biases are rounded to in the packed file, see ``save_quantized``.

    Raises:
        OptionError: If a value is not allowed, or the packages of an export are missing.
    """

    save: bool = True
    export: Literal["onnx"] | None = None
    other_dtype: OtherType = None

    def __post_init__(self) -> None:
        if not isinstance(self.save, bool):
            raise OptionError(f"save={self.save!r} is not allowed; give True or False.")
        if self.export not in (None, "onnx"):
            raise OptionError(f"export={self.export!r} is not known; give 'onnx' or None.")
        check_other_dtype(self.other_dtype)
        if self.export and (missing := [name for name in PACKAGES if find_spec(name) is None]):
            raise OptionError(f"export='onnx' needs {', '.join(missing)}; run pip install 'lightning-caq[onnx]'.")


def save_network(
    trainer: Trainer, pl_module: LightningModule, directory: Path, *, saving: Saving, ratio: float
) -> None:
    """Write a quantized network, and say what was written and how it is loaded.

    A file that cannot be written brings a warning; the network in hand and the other files stay as they are. Every rank
    has to call this, since optimizers and data may be gathered from all; rank zero writes.

    Args:
        trainer: The trainer, inside a hook.
        pl_module: Its module, quantized, the plan already with the callback.
        directory: The folder of the run's files.
        saving: What to write.
        ratio: Float32 size over quantized size of the weights, to be shown beside that of the file.
    """
    written: list[Path] = []

    def attempt(path: Path, write: Callable[[Path], object]) -> None:
        if trainer.is_global_zero and _write(path, write):
            written.append(path)

    if saving.save:
        attempt(directory / NETWORK, lambda path: save_quantized(pl_module, path, other_dtype=saving.other_dtype))
        # Not trainer.save_checkpoint: a checkpoint plugin may write later, or elsewhere.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        path = unused((checkpoint_folder(trainer) or directory) / CHECKPOINT)
        attempt(path, lambda path: TorchCheckpointIO().save_checkpoint(checkpoint, path))
    if saving.export:
        example = _example_input(trainer, pl_module)
        attempt(directory / ONNX, lambda path: export_onnx(pl_module, path, example))
    if written:
        rank_zero_info("\n".join(_lines(pl_module, written, ratio, _configuration(trainer, directory.parent))))


def tell_of_float(trainer: Trainer) -> None:
    """Say that what runs is a float network, and where a quantized one lies.

    Every rank has to call this: ``log_dir`` is a collective.
    """
    quantized, what = _quantized_beside(trainer), str(trainer.state.fn and trainer.state.fn.value)
    loaded = f" Its weights come from {_short(Path(trainer.ckpt_path))}." if trainer.ckpt_path else ""
    if what == "validate":
        beside = f" A network that was quantized before lies in {_short(quantized)}." if quantized else ""
        rank_zero_info(f"caq: this is a float network; it is quantized now, before it is validated.{loaded}{beside}")
        return
    remedy = (
        f'a quantized one lies in {_short(quantized)}: load it with ckpt_path="{_short(quantized)}", or --ckpt_path.'
        if quantized
        else "fit or validate with this callback to make one."
    )
    rank_zero_warn(f"caq: {what} runs the float network, not a quantized one; {remedy}{loaded}")


def _quantized_beside(trainer: Trainer) -> Path | None:
    """The last checkpoint of a quantized network that lies with the one that was loaded, or in the log folder."""
    folders = [log_folder(trainer)]
    if trainer.ckpt_path:
        loaded = Path(trainer.ckpt_path).parent
        folders = [loaded, loaded.parent, *folders]
    stem, suffix = Path(CHECKPOINT).stem, Path(CHECKPOINT).suffix
    patterns = [f"{place}{stem}*{suffix}" for place in ("", "checkpoints/", "caq*/")]
    for folder in folders:
        paths = [path for pattern in patterns for path in folder.glob(pattern)]
        if paths:
            return max(paths, key=lambda path: path.stat().st_mtime)
    return None


def checkpoint_folder(trainer: Any) -> Path | None:
    """Where the run's own checkpoints lie; ``None`` without any, or where that is not a folder of this machine."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return None if not folder or "://" in str(folder) else Path(folder)


def _write(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file in full beside its place and move it there; whether that could be done."""
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        os.replace(unfinished, path)
    except Exception as error:  # a full disk, state that cannot be stored, an operator that ONNX lacks
        rank_zero_warn(
            f"caq: {path} could not be written ({type(error).__name__}: {error}); the network is quantized all the "
            "same, and lightning_caq.save_quantized or trainer.save_checkpoint can write it to another place."
        )
        return False
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def _example_input(trainer: Trainer, pl_module: LightningModule) -> Any:
    """What the module is called with: its ``example_input_array``, or the arguments that a training batch fills."""
    if pl_module.example_input_array is not None:
        return pl_module.example_input_array
    batch, *_ = training_batches(trainer, pl_module, 2, seed=0, whole=False)
    args, kwargs = next(possible_arguments(pl_module, batch)).of(batch)
    return inspect.signature(pl_module.forward).bind(*args, **kwargs).arguments if kwargs else args


def _lines(pl_module: LightningModule, written: Sequence[Path], ratio: float, configuration: Path | None) -> list[str]:
    """What was written, and what loads it."""
    lines, named = ["caq: the quantized network is saved."], {path.suffix: path for path in written}
    whole = 4 * sum(x.numel() for x in pl_module.state_dict().values() if isinstance(x, Tensor))
    for path in written:
        size = path.stat().st_size
        beside = f", {whole / size:.1f}x smaller than in float32 (the weights alone {ratio:.1f}x)"
        lines.append(f"  {_short(path)}: {size:,} bytes{beside if path.name == NETWORK else ''}")
    if packed := named.get(Path(NETWORK).suffix):
        lines.append(f'  load it: lightning_caq.load_quantized({type(pl_module).__name__}(...), "{_short(packed)}")')
    if checkpoint := named.get(Path(CHECKPOINT).suffix):
        by_trainer = f'trainer.test(model, ckpt_path="{_short(checkpoint)}")'
        lines.append(f"  or:      {_command(configuration, checkpoint) if configuration else by_trainer}")
    return lines


def _short(path: Path) -> str:
    """A path as it is typed from here: relative where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _configuration(trainer: Any, folder: Path) -> Path | None:
    """The configuration that a LightningCLI saved in the log folder; ``None`` if none started this run."""
    names = [name for callback in trainer.callbacks if (name := getattr(callback, "config_filename", None))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _command(configuration: Path, checkpoint: Path) -> str:
    """The command that tests a checkpoint."""
    options = ["--config", _short(configuration), "--ckpt_path", _short(checkpoint)]
    return shlex.join(["python", _short(Path(sys.argv[0])), "test", *options])
