"""What ``test_sharing.py`` runs in every process: ``python sharing_script.py FOLDER RANK RANKS``.

The processes meet at ``FOLDER/meet`` and each writes what it found to ``FOLDER/rank<RANK>.pt``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import nets
import torch
import torch.distributed as dist

from lightning_caq.measures.hessian.gauss_newton import GaussNewton
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.layer import kappa
from lightning_caq.measures.measure import measure
from lightning_caq.measures.registry import available_measures
from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.utilities.sharing import ALONE, Sharing, divided

# Sizes of the batches that a case is measured on: fewer than ranks, with fewer samples than ranks, as many, more.
SIZES = {"mlp": (5,), "tied": (1,), "cnn": (3, 2), "frozen_inplace": (4, 1, 3)}
OBJECTIVES = ("distill", "task")


def case(name: str) -> nets.Case:
    """A network of ``nets`` with batches of other sizes, the same in every process."""
    torch.manual_seed(0)
    found = nets.make_case(name)
    found.net.requires_grad_(True)
    found.batches[:] = [_batch(found.batches[0], size) for size in SIZES[name]]
    return found


def _batch(like: Any, size: int) -> Any:
    if isinstance(like, dict):
        return {key: _batch(value, size) for key, value in like.items()}
    shape = (size, *like.shape[1:])
    return torch.randn(shape, dtype=like.dtype) if like.is_floating_point() else torch.randint(0, 6, shape)


def task(net: Any, batch: Any) -> torch.Tensor:
    return nets.task_loss(run_model(net, batch).values)


def profile(name: str, objective: str, sharing: Sharing = ALONE, **kwargs: Any) -> Any:
    found = case(name)
    options = {"needs": available_measures(), "bits": (2, 3, 8), "eigenpairs": 3, "loss_fn": task, **kwargs}
    return measure(found.net, found.batches, objective=objective, sharing=sharing, **options)


def products(name: str, objective: str, sharing: Sharing = ALONE) -> dict[str, list[torch.Tensor]]:
    """What the Hessian and the Gauss–Newton matrix give for the same vector on every rank."""
    found = case(name)
    layers = find_layers(found.net, found.batches[0])
    operator = Hessian(found.net, layers, make_objective(objective, found.net, found.batches, task), sharing=sharing)
    vector = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = {
        "product": [operator.product(vector)],
        "layers": operator.layer_products(operator.split(vector)),
        "gradient": operator.gradient(),
    }
    if objective == "distill":  # its Hessian is a Gauss–Newton matrix
        outputs = GaussNewton(found.net, layers, found.batches, sharing=sharing)
        results["product, Gauss–Newton"] = [outputs.product(vector)]
        results["layers, Gauss–Newton"] = outputs.layer_products(outputs.split(vector))
    return results


def caught(act: Callable[[], Any]) -> tuple[str, str, float]:
    """Class and text of the error that something ends with, and after how many seconds."""
    start = time.perf_counter()
    try:
        act()
    except BaseException as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def failing(rank: int, calls: int) -> Callable[..., torch.Tensor]:
    """A loss that raises on one rank, at one of its calls."""
    count = 0

    def loss(net: Any, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if dist.get_rank() == rank and count == calls:
            raise ZeroDivisionError(f"call {calls}")
        return task(net, batch)

    return loss


# What is asked for, and which call of the loss fails: ahead of the first step, and in the middle of three steps.
FAILURES = {
    "start": ({"kappa"}, 2),  # the first call only looks at how the loss runs the network
    "slopes": ({"gradient_norm"}, 4),
    "Hessian": ({"subspace"}, 4),
    "rounded": ({"loss_change"}, 11),
}


def failures(sharing: Sharing) -> dict[str, Any]:
    """Rank 1 fails in the middle of measuring: how it ends on this rank, and whether the network is as it was."""
    results = {}
    for place, (needs, calls) in FAILURES.items():
        found = case("frozen_inplace")
        before = {key: value.clone() for key, value in found.net.state_dict().items()}
        options = {"objective": "task", "loss_fn": failing(1, calls), "needs": frozenset(needs), "sharing": sharing}
        error = caught(lambda found=found, options=options: measure(found.net, found.batches, **options))
        results[place] = (*error, all(torch.equal(before[key], x) for key, x in found.net.state_dict().items()))
    return results


def together(sharing: Sharing) -> dict[str, Any]:
    """How a block ends on each rank."""
    own = [KeyError("a"), OSError("b"), KeyboardInterrupt()]

    def only(rank: int, error: BaseException, *, inner: bool) -> None:
        with sharing.agreed("outer"):
            sharing.sum(torch.ones(1), "before")
            if inner:
                with sharing.agreed("inner"):
                    _raise_on(sharing, rank, error)
            else:
                _raise_on(sharing, rank, error)
                sharing.sum(torch.ones(3), "after")

    def everywhere() -> None:
        with sharing.agreed("block"):
            raise own[sharing.rank]

    def astray() -> None:
        with sharing.agreed("block"):
            sharing.sum(torch.ones(1), f"place {sharing.rank}")

    return {
        "first": caught(lambda: only(0, own[0], inner=False)),
        "inner": caught(lambda: only(1, own[1], inner=True)),
        "interrupt": caught(lambda: only(1, own[2], inner=False)),
        "everywhere": caught(everywhere),
        "astray": caught(astray),
        "sum": sharing.sum(torch.tensor([1.0, 10.0 * sharing.rank]), "sum"),
        "gather": sharing.gather({f"of {sharing.rank}": sharing.rank}, "gather"),
        "first value": sharing.first(f"of {sharing.rank}", "first"),
    }


def _raise_on(sharing: Sharing, rank: int, error: BaseException) -> None:
    if sharing.rank == rank:
        raise error


def dealt(sharing: Sharing) -> dict[str, int]:
    """How much of the work this rank does: layers by themselves, and batches whose graph is built."""
    with (
        mock.patch.object(kappa, "second_order_sensitivity", wraps=kappa.second_order_sensitivity) as layers,
        mock.patch.object(Hessian, "_build", autospec=True, side_effect=Hessian._build) as batches,
    ):
        profile("frozen_inplace", "task", sharing, needs=frozenset({"kappa", "subspace"}))
    return {"layers": layers.call_count, "batches": len({call.args[1] for call in batches.call_args_list})}


def reuse(sharing: Sharing) -> dict[str, Any]:
    """A profile of an earlier run that only one of the ranks has found."""
    known = profile("mlp", "distill")
    kept = {
        owner: profile("mlp", "distill", sharing, known=known if sharing.rank == owner else None).seconds
        == sharing.first(known.seconds, "seconds")
        for owner in range(2)
    }
    few = profile("cnn", "distill", sharing, time_budget=1e-9)
    return {"kept": kept, "samples": few.samples}


def main(folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=180)
    )
    sharing = divided()
    results: dict[str, Any] = {
        "profiles": {(n, o): profile(n, o, sharing).to_json() for n in SIZES for o in OBJECTIVES},
        "dealt": dealt(sharing),
        "products": {(n, o): products(n, o, sharing) for n in SIZES for o in OBJECTIVES},
    }
    if ranks == 2:
        results |= {"failures": failures(sharing), "together": together(sharing), "reuse": reuse(sharing)}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
    # Threads of torch's process groups may let go of their last tensors while the interpreter ends, which then aborts
    # the process now and then ("terminate called without an active exception"). All is written: leave at once.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
