"""The callback: when things happen. What happens is decided in the other parts of the package."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_caq import pipeline
from lightning_caq.bridge import averaging, loggers, ranks, trainers
from lightning_caq.bridge.calibration import as_taken, training_batches
from lightning_caq.bridge.checkpoints import put_in_force, put_on_grid, restore, state_of
from lightning_caq.bridge.failures import failures_reported
from lightning_caq.bridge.folders import earlier_profile, output_directory
from lightning_caq.bridge.loss import quiet_loss, training_loss
from lightning_caq.bridge.monitoring import Monitor
from lightning_caq.bridge.outputs import Outcome, float_weights, shows_progress, write
from lightning_caq.bridge.packages import Callback
from lightning_caq.bridge.saved import Saving, save_network, tell_of_float
from lightning_caq.bridge.undisturbed import undisturbed
from lightning_caq.bridge.validation import isolated_validation
from lightning_caq.bridge.watched_metric import WatchedMetric
from lightning_caq.errors import OptionError, exiting_with_parser
from lightning_caq.evaluation.run_report import RETRAINED, retrained_report
from lightning_caq.network.layers import chosen_layers
from lightning_caq.network.parts.expand import every_weight_a_layer
from lightning_caq.options import QuantizationOptions, plain
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules
from lightning_caq.report import QuantizationReport
from lightning_caq.utilities.contexts import curvature_safe
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.keywords import known_keywords, takes_fields_of
from lightning_caq.utilities.progress import Progress


@takes_fields_of(QuantizationOptions)
class CurvatureQuantizationCallback(Callback):
    """Quantize a network to mixed precision when its training ends, guided by the curvature of its loss.

    At the end of ``trainer.fit`` the callback measures the trained network on training data, gives each layer the bits
    that its curvature asks for within the budget, rounds the weights, validates the float, the quantized and the
    compared networks, and writes the report to ``<log_dir>/caq/``, the loggers and the console. Under a stand-alone
    ``trainer.validate`` a network that is not quantized yet is quantized first, so that its metrics are those of the
    quantized network.

    The network stays the same object: weights are replaced by their rounded values, and layers turn into fake-quant
    layers with the same parameters and state-dict keys. A second ``fit`` trains the quantized network on through
    straight-through gradients. Quantization is simulated in floating point; the network does not run faster.

    Note:
        Checkpoints that ``ModelCheckpoint`` writes while the float network trains hold float weights. Loading one into
        the quantized network, as ``trainer.test(ckpt_path="best")`` does, runs it as the float network it is, with a
        warning. ``ModelCheckpoint(save_last=True)`` may write its last checkpoint after quantization; that one holds
        the quantized network, and holds the plan for this callback.

    Note:
        Strategies that shard weights (FSDP, DeepSpeed, ModelParallel) are refused. Under strategies that start
        processes (``ddp_spawn``) the main process keeps no result; load the plan from ``<log_dir>/caq/``.

    Args:
        options: Every field of QuantizationOptions.
        loss_fn: The loss of a batch, ``(module, batch) -> tensor``, for ``objective="task"``. By default the module's
            ``curvature_loss(batch)`` if it has one, else its ``training_step``.
        evaluate: Whether to validate the float, quantized and compared networks.
        monitor_every_n_epochs: Measure and log curvature during training at most this often, in epochs; 0 never does.
        on_error: What happens if quantization fails: ``raise`` the error, or ``warn`` and go on with the float network.
            Either way the float network and its checkpoints stay as training left them.
        save: Whether to write the quantized network: ``<log_dir>/caq/network.safetensors``, which ``load_quantized``
            takes, and ``quantized.ckpt`` beside the checkpoints of the run, a checkpoint of Lightning.
        export: ``"onnx"`` writes ``<log_dir>/caq/network.onnx`` too, on the module's ``example_input_array`` or else a
            training batch.
        other_dtype: ``"float16"`` rounds statistics and biases to half precision in ``network.safetensors``, for a
            smaller file; the network in hand and ``quantized.ckpt`` keep every bit.

    Raises:
        OptionError: If there is no such argument, or it has a value that is not allowed.
        BudgetError: If there is no budget, two, or one out of range.

    Example::

        trainer = Trainer(callbacks=CurvatureQuantizationCallback(method="cet", avg_bits=3))
        trainer.fit(model, datamodule)
        trainer.test(model, datamodule)  # the quantized network
    """

    def __init__(
        self,
        method: str = "cet",
        *,
        loss_fn: Callable[[nn.Module, Any], Any] | None = None,
        evaluate: bool = True,
        monitor_every_n_epochs: int = 0,
        on_error: Literal["raise", "warn"] = "raise",
        save: bool = True,
        export: Literal["onnx"] | None = None,
        other_dtype: Literal["float16"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        with exiting_with_parser():
            self.options = QuantizationOptions(method=method, **known_keywords(CurvatureQuantizationCallback, options))
            if on_error not in ("raise", "warn"):
                raise OptionError(f"on_error={on_error!r} is not known; choose from 'raise', 'warn'.")
            if self.options.max_drop is not None and not evaluate:
                raise OptionError("max_drop needs validation runs; leave evaluate=True.")
            if loss_fn is not None and not callable(loss_fn):
                raise OptionError(f"loss_fn={loss_fn!r} is not a function of (module, batch) that returns a loss.")
            if type(monitor_every_n_epochs) is not int or monitor_every_n_epochs < 0:
                given = f"monitor_every_n_epochs={monitor_every_n_epochs!r}"
                raise OptionError(f"{given} is not allowed; give a whole number, 0 for never.")
            self.saving = Saving(save=save, export=export, other_dtype=other_dtype)
        self.loss_fn = loss_fn
        self.evaluate = evaluate
        self.on_error = on_error
        self.monitor_every_n_epochs = monitor_every_n_epochs
        self._monitor = Monitor(monitor_every_n_epochs)
        self._watched = WatchedMetric(self.options)
        self._checked = False
        self._told: set[str] = set()  # notes that the user has had in this run
        self._outcome: Outcome | None = None
        self._network: weakref.ref[nn.Module] | None = None  # the network that the plan is in force on

    @property
    def plan(self) -> QuantizationPlan | None:
        """Bits, scales and codes of every layer; ``None`` before a run."""
        return self._outcome.plan if self._outcome else None

    @property
    def profile(self) -> CurvatureProfile | None:
        """What was measured; ``None`` before a run."""
        return self._outcome.profile if self._outcome else None

    @property
    def report(self) -> QuantizationReport | None:
        """Float against quantized, with sizes; ``None`` before a run."""
        return self._outcome.report if self._outcome else None

    @property
    @override
    def state_key(self) -> str:
        """The key of this callback in a checkpoint; several of them may be in one list."""
        return self._generate_state_key(method=self.options.method, budget=str(self.options.budget))

    # ------------------------------------------------------------------------------------------------------- hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before a run starts; refuses what cannot work and warns of what would spoil the result."""
        if trainers.is_superseded(trainer, self):
            rank_zero_warn(
                f"caq: {self.state_key} does nothing, because another {type(self).__name__} follows it in the list of "
                "callbacks; only the last one quantizes."
            )
        if stage in ("fit", "validate"):
            trainers.refuse_sharded(trainer)
            loggers.announce(trainer, self.options)
        if stage == "fit":
            trainers.warn_of_late_averaging(trainer, self)
            self._monitor.restart()
            self._watched.restart()
            self._checked = False
            self._told.clear()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before training; refuses what is certain to fail after it."""
        if self.on_error == "warn" or trainers.is_superseded(trainer, self) or quantized_modules(pl_module):
            return
        self._watched.refuse_without_validation(trainer)
        if self.options.objective == "task":
            quiet_loss(pl_module, self.loss_fn)
        if not any(map(is_lazy, pl_module.parameters())):
            with every_weight_a_layer(pl_module):
                chosen_layers(pl_module, self.options.include, self.options.exclude)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training step; runs the first batch through everything that could refuse after training."""
        if self._checked or trainers.is_superseded(trainer, self) or quantized_modules(pl_module):
            return
        self._checked = True
        task = self.options.objective == "task"
        with failures_reported(self.on_error), undisturbed(pl_module), ranks.sharing(trainer).agreed("check"):
            loss = quiet_loss(pl_module, self.loss_fn) if task else None
            seen = loss or training_loss(pl_module, self.loss_fn)
            taken = batch if task else as_taken(pl_module, [batch])[0]
            progress = Progress(rank_zero_info, told=self._told)
            pipeline.check(pl_module, taken, self.options, loss_fn=loss, training_loss=seen, progress=progress)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation starts; quantizes before a stand-alone one, measures curvature during training."""
        if trainer.sanity_checking or trainers.is_trial(trainer) or trainers.is_superseded(trainer, self):
            return
        if trainer.state.fn == "fit":
            if self._outcome:
                averaging.keep_grids(trainer, self, self._outcome.plan)
            self._monitor.look(trainer, pl_module, self.options)
        elif not self._in_force(pl_module):
            tell_of_float(trainer)
            self._quantize(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends, that of the sanity check too; looks up the metric that ``max_drop`` watches."""
        if trainer.state.fn != "fit" or trainers.is_trial(trainer) or trainers.is_superseded(trainer, self):
            return
        with failures_reported(self.on_error):
            self._watched.look(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a test starts; makes sure that the network is still swapped, or says that it is a float one."""
        self._tell_of_float(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when prediction starts; the same as when a test starts."""
        self._tell_of_float(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends; quantizes, or settles a quantized network that was trained on."""
        if trainers.is_superseded(trainer, self):
            return
        if trainers.is_trial(trainer):
            rank_zero_info("caq: nothing is quantized or written under fast_dev_run.")
            return
        swapped = quantized_modules(pl_module).values()
        if self._outcome and swapped and all(rounding_state(module).quantizing for module in swapped):
            averaging.keep_grids(trainer, self, self._outcome.plan)
            self._settle(trainer, pl_module, self._outcome)
        else:
            # A float checkpoint was loaded into a swapped network, or the network was swapped by someone else's plan.
            for network in (pl_module, *averaging.averaged_networks(trainer, self)):
                restore_modules(network)
            self._quantize(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain containers and tensors, and nothing before a run."""
        return {} if self._outcome is None else state_of(self._outcome)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is written; keeps the weights of a swapped network on their grid.

        While such a network trains on, its parameters are off the grid. The checkpoint gets the values that the network
        computes with, so that it is the network that was validated, and the parameters under a key of their own.
        """
        put_on_grid(pl_module, checkpoint)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint was loaded, weights included; swaps the network by the plan that came with it.

        The plan is used whatever the options of this callback are: it tells what the weights in the checkpoint are.
        """
        if trainers.is_superseded(trainer, self):
            return
        averages, resuming = averaging.averaged_networks(trainer, self), trainer.state.fn == "fit"
        outcome = restore(pl_module, checkpoint, type(self).__qualname__, resuming=resuming, averages=averages)
        if outcome is not None:
            self._keep(pl_module, outcome)

    # ----------------------------------------------------------------------------------------------------- workers

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A whole run; whatever goes wrong in it, the float network is left."""
        options, sharing = self.options, ranks.sharing(trainer)
        with self._working(trainer, pl_module) as directory, sharing.agreed("quantization"):
            ranks.share_buffers(trainer, pl_module)
            floats = float_weights(trainer, pl_module)
            float_state = ranks.float_values(trainer, pl_module)
            task = options.objective == "task"
            batches = training_batches(trainer, pl_module, options.calibration_samples, options.seed, whole=task)
            loss = quiet_loss(pl_module, self.loss_fn) if task else None
            seen = loss or training_loss(pl_module, self.loss_fn)
            validate = isolated_validation(trainer, pl_module) if self.evaluate else None
            result = pipeline.run(
                pl_module,
                batches,
                options,
                loss_fn=loss,
                training_loss=seen,
                evaluate=validate,
                direction=self._watched.directions(trainer, pl_module),
                profile=earlier_profile(directory) or self.profile,
                progress=Progress(rank_zero_info, bar=shows_progress(trainer), told=self._told),
                sharing=sharing,
            )
            plan = ranks.agree(trainer, pl_module, result.plan, float_state)
            studies = replace(result.report.studies, training=tuple(self._monitor.epochs))
            report = replace(result.report, studies=studies, options=result.report.options | self._arguments)
            outcome = Outcome(plan, result.profile, report)
            write(trainer, directory, outcome, floats)
            self._keep(pl_module, outcome)

    def _settle(self, trainer: Trainer, pl_module: LightningModule, before: Outcome) -> None:
        """Snap a network that was trained on to its grid, and validate it again."""
        sharing = ranks.sharing(trainer)
        with self._working(trainer, pl_module) as directory, sharing.agreed("settling"):
            ranks.share_buffers(trainer, pl_module)
            plan = before.plan.settled(pl_module)
            sharing.meet("validation")
            validate = isolated_validation(trainer, pl_module) if self.evaluate else None
            metrics = {} if validate is None else validate(pl_module)
            outcome = Outcome(plan, before.profile, retrained_report(before.report, metrics))
            Progress(rank_zero_info, told=self._told).tell(RETRAINED)
            write(trainer, directory, outcome, {})
            self._keep(pl_module, outcome)

    @property
    def _arguments(self) -> dict[str, Any]:
        """The arguments beside the options that are not their defaults, as plain values."""
        given: dict[str, Any] = {
            "loss_fn": plain(self.loss_fn),
            "evaluate": self.evaluate,
            "monitor_every_n_epochs": self.monitor_every_n_epochs,
            "on_error": self.on_error,
            **asdict(self.saving),
        }
        defaults = inspect.signature(type(self)).parameters
        return {name: value for name, value in given.items() if value != defaults[name].default}

    @contextmanager
    def _working(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Path]:
        """The surroundings of any work on the network; gives the folder for what comes of it, and saves the network.

        If the work fails, the network is put back whole and that is said.
        """
        directory, before = output_directory(trainer), self._outcome
        averaged = averaging.averages_settled(trainer, self, pl_module)
        with failures_reported(self.on_error), curvature_safe(pl_module), preserved(pl_module), averaged:
            yield directory
        if self._outcome is not None and self._outcome is not before:
            save_network(trainer, pl_module, directory, saving=self.saving, ratio=self._outcome.plan.ratio)

    def _keep(self, pl_module: nn.Module, outcome: Outcome) -> None:
        self._outcome = outcome
        self._network = weakref.ref(pl_module)

    def _tell_of_float(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainers.is_trial(trainer) or trainers.is_superseded(trainer, self):
            return
        swapped = self._in_force(pl_module)
        modules = quantized_modules(pl_module).values()
        if not (swapped and any(rounding_state(module).quantizing for module in modules)):
            tell_of_float(trainer)

    def _in_force(self, pl_module: LightningModule) -> bool:
        """Whether the network is swapped; swaps it again if a ``configure_model`` that ran once more undid that."""
        if quantized_modules(pl_module):
            return True
        if self.plan is None or self._network is None or self._network() is not pl_module:
            return False
        return put_in_force(self.plan, pl_module)
