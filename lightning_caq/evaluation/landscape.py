"""The landscape: the loss on a plane through the float weights, with the path that rounding takes on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.leading_pairs import folded_hessian, leading_pairs
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective
from lightning_caq.network.perturbed import replaced_weights
from lightning_caq.studies import Landscape

Direction = Sequence[Tensor]


def plane(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    errors: Mapping[str, Tensor],
    *,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """The plane that holds the rounding error: its short axis is the steepest eigenvector, its long axis the rest.

    The short axis u is the eigenvector of the eigenvalue of largest magnitude, by Lanczos (about ten Hessian–vector
    products); the long axis v is the part of the rounding error Δ that is orthogonal to it. Nearly all of Δ's
    dimensions have next to no curvature, so v is a long axis as good as any, and Δ lies in the plane.

    Args:
        model: The float network, in eval mode, its layers' weights requiring gradients.
        layers: The layers.
        objective: The objective whose Hessian is meant.
        errors: Layer name to Δ_i.
        seed: Seed of Lanczos' starting vector.

    Returns:
        The two axes, each of length 1, one tensor a layer; u points to the side on which Δ lies.

    Raises:
        ValueError: If Δ is zero or lies along the short axis, so that there is no plane.
    """
    with folded_hessian(model, layers, objective) as hessian:
        u = leading_pairs(hessian, 1, seed).vectors[:, 0]
    delta = torch.cat([errors[layer.name].flatten() for layer in layers]).to(u)
    along = torch.dot(u, delta)
    v = delta - along * u
    length = v.norm()
    if not float(length) > 1e-6 * float(delta.norm()):
        raise ValueError("The rounding error is zero or lies along the short axis; there is no plane to draw.")
    return hessian.split(u * (1.0 if float(along) >= 0 else -1.0)), hessian.split(v / length)


def landscape(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    short: Direction,
    long: Direction,
    errors: Mapping[str, Tensor],
    *,
    size: int = 15,
    reach: float = 1.5,
) -> Landscape:
    """The loss over a plane that is spanned by two directions, and the path of the rounding error on it.

    Costs ``size``² + 1 evaluations of the objective and two Hessian–vector products: take few samples. Each axis
    reaches to both sides ``reach`` times as far as the path does on it, and at least so far that the quadratic model of
    the loss rises as much along it as along the other.

    Args:
        model: The float network, in eval mode, its layers' weights requiring gradients; the weights are put back.
        layers: The layers.
        objective: The objective ℓ, on the samples it is to be drawn for.
        short: Direction u of length 1, one tensor a layer.
        long: Direction v of length 1, orthogonal to u.
        errors: Layer name to Δ_i.
        size: Grid points an axis, at least 2.
        reach: How far beyond the path to look.

    Returns:
        The landscape.

    Raises:
        ValueError: If the directions are not orthogonal and of length 1, or ``size`` is below 2.
    """
    _check(short, long, size)
    moves = [errors[layer.name].to(u) for layer, u in zip(layers, short, strict=True)]
    steps = [(_dot([d], [u]), _dot([d], [v])) for d, u, v in zip(moves, short, long, strict=True)]
    path = [(0.0, 0.0)]
    for s, t in steps:
        path.append((path[-1][0] + s, path[-1][1] + t))
    operator = Hessian(model, layers, objective)
    curvatures = tuple(_curvature(operator, direction) for direction in (short, long))
    wide, tall = _reaches(path, curvatures, reach)
    along, across = (torch.linspace(-far, far, size).tolist() for far in (wide, tall))
    weights = [layer_weight(model, layer).detach().clone() for layer in layers]
    reference = objective.value(model)

    def loss_at(s: float, t: float) -> float:
        places = zip(layers, weights, short, long, strict=True)
        with replaced_weights(model, layers, {layer.name: w + s * u + t * v for layer, w, u, v in places}):
            return objective.value(model) - reference

    loss = tuple(tuple(loss_at(s, t) for s in along) for t in across)
    whole = _dot(moves, moves)
    inside = path[-1][0] ** 2 + path[-1][1] ** 2
    outside = max(1 - inside / whole, 0.0) ** 0.5 if whole > 0 else 0.0
    return Landscape(tuple(along), tuple(across), loss, (curvatures[0], curvatures[1]), tuple(path), outside)


def _check(short: Direction, long: Direction, size: int) -> None:
    lengths = _dot(short, short) ** 0.5, _dot(long, long) ** 0.5
    if abs(_dot(short, long)) > 1e-3 or any(abs(length - 1) > 1e-3 for length in lengths):
        raise ValueError(
            f"The two directions must be orthogonal and of length 1; their lengths are {lengths[0]:.4g} and "
            f"{lengths[1]:.4g}, their product is {_dot(short, long):.4g}."
        )
    if size < 2:
        raise ValueError(f"size={size} is too small; a grid has at least 2 points an axis.")


def _reaches(path: Sequence[tuple[float, float]], curvatures: Sequence[float], reach: float) -> tuple[float, float]:
    """Half the length of each axis."""
    wide, tall = (reach * max(abs(point[axis]) for point in path) for axis in (0, 1))
    steep, flat = (abs(curvature) for curvature in curvatures)
    ratio = (flat / steep) ** 0.5 if steep > 0 and flat > 0 else 1.0
    return max(wide, ratio * tall) or 1.0, max(tall, wide / ratio) or 1.0


def _curvature(operator: Hessian, direction: Direction) -> float:
    vector = operator.like(torch.cat([d.flatten() for d in direction]))
    return float(torch.dot(vector.double(), operator.product(vector).double()))


def _dot(a: Direction, b: Direction) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
