"""The files of a quantized network: each loads as that network, in code and by a Trainer, and none costs a run."""

from __future__ import annotations

import errno
import re
import warnings
from pathlib import Path

import lit
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import AtHook, Classifier, fit, is_quantized, quantizer, train_loader, trainer, val_loader

from lightning_caq import load_quantized
from lightning_caq.bridge import saved
from lightning_caq.errors import OptionError
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
X = lit.blobs(48, seed=1).tensors[0]


def outputs(module):
    module.eval()
    with torch.no_grad():
        return module(X)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, the callback and the module of a fit."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    with lit.without_figures():
        callback = quantizer(activation_bits=8, save=True)
        module, _ = fit(folder, callback, callbacks=[ModelCheckpoint(folder / "ckpt")], enable_checkpointing=True)
    return folder, callback, module


def test_the_packed_file_is_the_network(run):
    folder, _, module = run
    other = load_quantized(Classifier(), folder / "caq" / "network.safetensors")
    assert torch.equal(outputs(other), outputs(module))


def test_the_checkpoint_lies_with_those_of_the_run_and_loads_everywhere(run, tmp_path):
    folder, callback, module = run
    path = folder / "ckpt" / "quantized.ckpt"
    plain = Classifier.load_from_checkpoint(path)
    assert is_quantized(plain, callback.plan)
    for use in ("test", "predict", "validate"):
        fresh, other = Classifier(), quantizer(avg_bits=8)
        t = trainer(tmp_path, callbacks=[other])
        getattr(t, use)(fresh, val_loader(), ckpt_path=path)
        assert other.plan.bits == callback.plan.bits
        assert torch.equal(outputs(fresh), outputs(module))
    fresh, other = Classifier(), quantizer()
    trainer(tmp_path, callbacks=[other], max_epochs=3).fit(fresh, train_loader(), val_loader(), ckpt_path=path)
    assert is_quantized(fresh, callback.plan)  # trained on, on the same grids
    assert not torch.equal(outputs(fresh), outputs(module))


def told(capture):
    return "\n".join(r.getMessage() for r in capture.records if "the quantized network is saved" in r.getMessage())


def test_the_console_ends_with_the_files_and_what_loads_them(tmp_path, caplog):
    with caplog.at_level("INFO"):
        module, _ = fit(tmp_path, quantizer())
    lines, packed = told(caplog).splitlines(), tmp_path / "caq" / "network.safetensors"
    assert caplog.records[-1].getMessage() == "\n".join(lines)
    size, floats = packed.stat().st_size, sum(4 * x.numel() for x in module.state_dict().values())
    assert f"{packed}: {size:,} bytes, {floats / size:.1f}x" in lines[1]
    assert f"{tmp_path / 'caq' / 'quantized.ckpt'}: " in lines[2]  # there are no checkpoints to lie with
    code = re.fullmatch(r"  load it: (lightning_caq\.)?(load_quantized\(.*\))", lines[3])[2].replace("...", "")
    loaded = eval(code, {"load_quantized": load_quantized, "Classifier": Classifier})
    assert torch.equal(outputs(loaded), outputs(module))
    fresh, other = Classifier(), quantizer()
    code = re.fullmatch("  or:      (.*)", lines[4])[1].replace("model,", "model, loader,")
    eval(code, {"trainer": trainer(tmp_path, callbacks=[other]), "model": fresh, "loader": val_loader()})
    assert torch.equal(outputs(fresh), outputs(module))


def test_a_full_disk_is_a_warning_and_loses_nothing(tmp_path, monkeypatch):
    real = saved.save_quantized

    def full(model, path, **options):
        real(model, path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved, "save_quantized", full)
    callback = quantizer()
    with pytest.warns(UserWarning, match=r"network\.safetensors could not be written \(OSError.*No space left"):
        module, t = fit(tmp_path, callback)
    assert t.state.finished
    assert is_quantized(module, callback.plan)
    written = {path.name for path in (tmp_path / "caq").iterdir()}
    assert {"plan.json", "report.json", "quantized.ckpt"} <= written
    assert not any(name.endswith(".safetensors") and "network" in name for name in written)  # nor a part of it


def test_save_false_and_a_trial_write_nothing(tmp_path, caplog):
    fit(tmp_path / "a", quantizer(save=False))
    assert not list((tmp_path / "a").rglob("network.*")) + list((tmp_path / "a").rglob("*.ckpt"))
    with caplog.at_level("INFO"):
        fit(tmp_path / "b", quantizer(), fast_dev_run=True)
    assert not list((tmp_path / "b").rglob("*"))
    assert any("nothing is quantized or written under fast_dev_run" in r.getMessage() for r in caplog.records)


def test_a_second_fit_leaves_the_files_of_the_first(tmp_path):
    """Without a logger both have the same folder; the first trains a float network, the second trains on."""
    callback, module = quantizer(), Classifier()
    fit(tmp_path, callback, module)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = outputs(module).clone()
    module.train()
    fit(tmp_path, callback, module)
    fit(tmp_path, quantizer())
    assert all(path.read_bytes() == content for path, content in first.items())
    for folder, result in {"caq": before, "caq-v1": outputs(module)}.items():
        assert torch.equal(outputs(load_quantized(Classifier(), tmp_path / folder / "network.safetensors")), result)
    assert (tmp_path / "caq-v2" / "report.json").exists()


def test_a_second_checkpoint_in_a_folder_gets_a_version(tmp_path):
    for name in ("quantized.ckpt", "quantized-v1.ckpt"):
        keep = ModelCheckpoint(tmp_path / "ckpt", save_top_k=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory")
            fit(tmp_path, quantizer(), callbacks=[keep], enable_checkpointing=True)
        assert (tmp_path / "ckpt" / name).is_file()
    assert len(list((tmp_path / "ckpt").iterdir())) == 2


@pytest.mark.parametrize("known", [True, False])
def test_onnx_is_written_for_the_example_or_a_training_batch(tmp_path, known):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = Classifier()
    if known:
        module.example_input_array = torch.zeros(2, lit.FEATURES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter
        fit(tmp_path, quantizer(export="onnx"), module)
    session = onnxruntime.InferenceSession(tmp_path / "caq" / "network.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(module), atol=1e-4, rtol=1e-4)


def test_an_export_that_fails_is_a_warning(tmp_path):
    pytest.importorskip("onnxscript")
    module, callback = Classifier(), quantizer(export="onnx")
    module.example_input_array = torch.zeros(2, lit.FEATURES + 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, callback, module)
    assert any("network.onnx could not be written" in str(w.message) for w in caught)
    assert is_quantized(module, callback.plan)
    assert (tmp_path / "caq" / "network.safetensors").exists()


def test_statistics_are_halved_in_the_packed_file_alone(tmp_path):
    module, _ = fit(tmp_path, quantizer(other_dtype="float16"))
    loaded = load_quantized(Classifier(), tmp_path / "caq" / "network.safetensors")
    assert torch.equal(loaded.net[1].running_mean, module.net[1].running_mean.half().float())
    assert not torch.equal(loaded.net[1].running_mean, module.net[1].running_mean)
    state = torch.load(tmp_path / "caq" / "quantized.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["net.1.running_mean"], module.net[1].running_mean)


def test_wrong_values_are_refused_before_any_work(monkeypatch):
    with pytest.raises(OptionError, match="save='yes' is not allowed; give True or False"):
        quantizer(save="yes")
    with pytest.raises(OptionError, match="export='tflite' is not known; give 'onnx' or None"):
        quantizer(export="tflite")
    with pytest.raises(OptionError, match="other_dtype='int8' is not known"):
        quantizer(other_dtype="int8")
    monkeypatch.setattr(saved, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs onnx, onnxruntime, onnxscript; run pip install"):
        quantizer(export="onnx")


def test_a_test_of_a_float_network_says_so_and_where_the_quantized_one_lies(run, tmp_path):
    folder, *_ = run
    float_checkpoint = next((folder / "ckpt").glob("epoch*.ckpt"))
    t = trainer(tmp_path, callbacks=[quantizer()])
    for use in (t.test, t.predict):
        with pytest.warns(UserWarning, match=r"the float network, not a quantized one.*quantized\.ckpt") as caught:
            use(Classifier(), val_loader(), ckpt_path=float_checkpoint)
        (ours,) = [w for w in caught if "float network" in str(w.message)]
        assert Path(ours.filename) == Path(saved.__file__)
        assert float_checkpoint.name in str(ours.message)
    with pytest.warns(UserWarning, match="float network, not a quantized one; fit or validate with this callback"):
        t.test(Classifier(), val_loader(), verbose=False)


def test_validation_of_a_float_checkpoint_says_what_it_scores(run, tmp_path, caplog):
    folder, *_ = run
    float_checkpoint, module = next((folder / "ckpt").glob("epoch*.ckpt")), Classifier()
    module.train_dataloader = train_loader
    with caplog.at_level("INFO"):
        trainer(tmp_path, callbacks=[quantizer()]).validate(module, val_loader(), ckpt_path=float_checkpoint)
    (line,) = [r.getMessage() for r in caplog.records if "this is a float network; it is quantized now" in r.message]
    assert "quantized.ckpt" in line
    assert float_checkpoint.name in line
    assert quantized_modules(module)


def test_a_trial_and_a_quantized_network_say_nothing_of_float(tmp_path):
    callback = quantizer()
    module, t = fit(tmp_path, callback, callbacks=[AtHook("on_test_start", lambda t, m: len(quantized_modules(m)))])
    t.test(module, val_loader(), verbose=False)  # warnings are errors
    trainer(tmp_path, callbacks=[quantizer()], fast_dev_run=True).test(Classifier(), val_loader(), verbose=False)
