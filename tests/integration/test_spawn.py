"""``ddp_spawn``: the main process keeps no plan, but the files of the run, and they are enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import spawn_script
import torch
from lit import blobs

from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.swap import quantized_modules


def test_the_plan_on_disk_makes_the_main_process_network_the_quantized_one(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", str(Path(spawn_script.__file__)), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    main = torch.load(tmp_path / "main.pt", weights_only=True)
    assert main["plan"] is None
    assert main["kinds"] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    plan = QuantizationPlan.load(tmp_path / "caq" / "plan.json")
    module = spawn_script.Spawned().eval()
    module.load_state_dict(main["state"], strict=False)
    plan.apply(module)
    assert set(quantized_modules(module)) == set(plan.bits) == {"net.0", "net.3"}
    with torch.no_grad():
        outputs = module(blobs(48, seed=1).tensors[0])
    assert torch.allclose(outputs, main["outputs"], atol=1e-6)  # Lightning had brought the quantized values back
    assert (tmp_path / "caq" / "report.html").exists()
