"""The Gram spectrum against the analytic Gauss–Newton matrix from dense Jacobians, in float64."""

import nets
import pytest
import torch
from every import every

from lightning_caq.measures.gram.layer_calls import find_layout
from lightning_caq.measures.gram.output_rows import choose_rows
from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.measure import differentiable
from lightning_caq.network.layers import find_layers
from lightning_caq.network.prepare import ModelUse, prepare

K = 4


class Setup:
    """A case with its dense Gauss–Newton matrix and random perturbations of every layer."""

    def __init__(self, name: str) -> None:
        self.case = nets.make_case(name)
        self.net, self.batches = self.case.net, self.case.batches
        self.layers = find_layers(self.net, self.batches[0])
        self.names = [layer.name for layer in self.layers]
        self.dense = nets.Dense(self.net, self.names)
        self.matrix = nets.gauss_newton(self.case, self.dense)
        self.deltas = {x.name: {3: torch.randn(x.shape, dtype=torch.float64)} for x in self.layers}

    def spectrum(self, **kwargs):
        with differentiable(self.net, self.layers):
            return gram_spectrum(
                self.net, self.layers, self.batches, self.deltas, **{"k": K, "tolerance": 0.0, **kwargs}
            )

    def placed(self, name: str) -> torch.Tensor:
        """Δ of one layer among zeros for the others."""
        parts = [
            (self.deltas[n][3] if n == name else torch.zeros_like(self.deltas[n][3])).flatten() for n in self.names
        ]
        return torch.cat(parts)


@every("name", nets.CASES)
def test_analytic_matrix_is_the_hessian_of_the_objective(name):
    """The references agree with each other: the distill Hessian is the Gauss–Newton matrix."""
    setup = Setup(name)
    torch.testing.assert_close(setup.dense.hessian(nets.distill_loss(setup.case)), setup.matrix, rtol=1e-7, atol=1e-9)


@every("name", nets.CASES)
def test_spectrum_traces_energies_and_projections(name):
    setup = Setup(name)
    spectrum = setup.spectrum()
    values, vectors = torch.linalg.eigh(setup.matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    top = float(values[0])
    wanted = values[values > 1e-5 * top]
    found = spectrum.values[: len(wanted)]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * top)
    assert float(spectrum.values[len(wanted) :].sum()) < 2e-5 * top * len(values)
    assert spectrum.kept == pytest.approx(1)

    lead, lead_values = vectors[:, :K], values[:K]
    start = 0
    for name, block, size in zip(setup.names, setup.dense.blocks(setup.matrix), setup.dense.sizes, strict=True):
        assert spectrum.traces[name] == pytest.approx(float(block.trace()), rel=1e-5)
        energy = lead_values @ lead[start : start + size].square().sum(0)
        assert spectrum.energies[name] == pytest.approx(float(energy), rel=1e-4)
        delta = setup.placed(name)
        inside = lead_values @ (lead.T @ delta).square()
        projected = spectrum.projected[name][3]
        assert float(projected[:K].square().sum()) == pytest.approx(float(inside), rel=1e-3)
        assert float(projected.square().sum()) == pytest.approx(float(delta @ setup.matrix @ delta), rel=1e-5)
        start += size


@every("name", nets.CASES)
def test_projections_of_layers_add_up_with_their_signs(name):
    """(Σ_i Δ_i)ᵀ H (Σ_i Δ_i) needs the signed components, not their squares."""
    setup = Setup(name)
    spectrum = setup.spectrum()
    whole = sum(setup.placed(name) for name in setup.names)
    signed = torch.stack([spectrum.projected[name][3] for name in setup.names]).sum(0)
    assert float(signed.square().sum()) == pytest.approx(float(whole @ setup.matrix @ whole), rel=1e-5)


@every("memory", [1, 2000])
def test_little_memory_gives_the_same(memory):
    setup = Setup("cnn")
    whole, parts = setup.spectrum(), setup.spectrum(memory=memory, exact=True)
    torch.testing.assert_close(parts.values, whole.values)
    assert parts.traces == pytest.approx(whole.traces)


@every("name", nets.CASES)
def test_little_memory_leaves_traces_and_quadratic_forms_exact(name):
    """Folded rows keep their norms and their products with errors."""
    setup = Setup(name)
    whole, folded = setup.spectrum(), setup.spectrum(memory=2000)
    assert folded.traces == pytest.approx(whole.traces)
    assert folded.trace == pytest.approx(whole.trace)
    for name in setup.names:
        squares = [float(s.projected[name][3].square().sum()) for s in (folded, whole)]
        assert squares[0] == pytest.approx(squares[1], rel=1e-5)


def test_dropped_rows_are_the_lightest_and_are_reported():
    setup = Setup("mlp")
    logits = torch.cat([setup.net(b).detach() for b in setup.batches])
    p = logits.softmax(1)
    shares = torch.stack(
        [p[s, c] * (torch.eye(3)[c] - p[s]).square().sum() for s in range(len(p)) for c in range(3)]
    ).sort(descending=True)
    choice = choose_rows(setup.net, setup.batches, 0.2, max_rows=10**6)
    rows, kept = choice.rows, choice.kept
    assert [3 * (r.sample + 5 * r.batch) + r.cls for r in rows] == sorted(shares.indices[: len(rows)].tolist())
    assert kept == pytest.approx(float(shares.values[: len(rows)].sum() / shares.values.sum()))
    assert not choice.sampled
    assert 0.8 <= kept < 1
    assert float(shares.values[: len(rows) - 1].sum() / shares.values.sum()) < 0.8  # one row fewer is too few

    spectrum = setup.spectrum(tolerance=0.2)
    assert (spectrum.rows, spectrum.kept) == (len(rows), pytest.approx(kept))
    values = torch.linalg.eigvalsh(setup.matrix).flip(0)[: len(spectrum.values)]
    assert bool((spectrum.values <= values + 1e-6).all())  # fewer rows can only lower eigenvalues
    assert set(spectrum.errors.values()) == {0.0}


def test_confident_outputs():
    """Classes of no probability carry nothing, and nothing breaks."""
    net, x = torch.nn.Linear(3, 3).double(), torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        net.weight.mul_(100)
    layers = find_layers(net, x)
    spectrum = gram_spectrum(net, layers, [x], {"": {}}, k=2)
    case = nets.Case(net, [x])
    jacobian = torch.autograd.functional.jacobian(
        lambda w: torch.nn.functional.linear(x, w, net.bias), net.weight.detach()
    ).reshape(6, 3, 9)
    p = case.output(net, x).detach().softmax(1)
    matrix = sum(j.T @ (torch.diag(q) - torch.outer(q, q)) @ j for j, q in zip(jacobian, p, strict=True)) / 6
    assert float(spectrum.values.sum()) == pytest.approx(float(matrix.trace()), rel=1e-3)


class _Layout(torch.nn.Module):
    """The same function of tokens with its tokens laid out in different ways."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.layout = torch.nn.Linear(3, 4), torch.nn.Linear(4, 5), layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "sequence first":
            return self.b(torch.tanh(self.a(x.transpose(0, 1)))).transpose(0, 1)
        y = torch.tanh(self.a(x))
        if self.layout == "plain":
            return self.b(y)
        flat = self.b(y.reshape(-1, 4))
        return flat if self.layout == "flat to the end" else flat.reshape(*y.shape[:2], 5)


@every("layout", ["flat inside", "flat to the end", "sequence first"])
@every("tokens", [3, 40])  # fewer than samples, and more than the rows that are taken at once
def test_the_layout_of_tokens_does_not_matter(layout, tokens):
    x = torch.randn(6, tokens, 3)
    found = []
    for kind in ("plain", layout):
        net = _Layout(kind).eval()
        layers = find_layers(net, x)
        found.append(gram_spectrum(net, layers, [x], {"a": {}, "b": {}}, k=3, max_rows=10_000))
    assert found[1].traces == pytest.approx(found[0].traces, rel=1e-4)
    torch.testing.assert_close(found[1].values[:10], found[0].values[:10], rtol=1e-3, atol=1e-8)


class _TokensFirst(torch.nn.Module):
    """Attention among the tokens of a sample, with tokens ahead of samples inside and in the outputs."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.a, self.b, self.out = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x.transpose(0, 1)))  # (tokens, samples, 4)
        mixed = torch.einsum("tnc,snc->tsn", y, y).softmax(1)
        y = torch.einsum("tsn,snc->tnc", mixed, y)
        # Flattened, tokens and samples share an axis, tokens first: no slice of it belongs to a sample.
        z = self.b(y.flatten(0, 1)).reshape(y.shape) if self.flat else self.b(y)
        return self.out(torch.tanh(z))


def test_samples_are_found_wherever_they_lie():
    """Along the second axis inside this network; where tokens and samples share an axis, nowhere."""
    x = torch.randn(3, 4, 3)
    for flat, axes in ((False, [1, 1, 1]), (True, None)):
        net = _TokensFirst(flat)
        watched = {id(net.get_submodule(layer.name)): layer for layer in find_layers(net, x)}
        (batch,) = prepare(net, [x], 3, use=ModelUse(output="classes"))
        layout = find_layout(net, watched, batch)
        assert (layout and layout.axes) == axes


@every("flat", [False, True])
@every("tokens", [2, 4])  # with four, tokens and samples are equally many in a batch
def test_tokens_before_samples_against_the_dense_matrix(flat, tokens):
    net = _TokensFirst(flat).double()
    batches = [torch.randn(4, tokens, 3, dtype=torch.float64), torch.randn(3, tokens, 3, dtype=torch.float64)]
    case = nets.Case(net, batches)
    batches = prepare(net, batches, 7, use=ModelUse(output="classes"))
    layers = find_layers(net, batches[0])
    dense = nets.Dense(net, [layer.name for layer in layers])
    matrix = nets.gauss_newton(case, dense)
    deltas = {x.name: {3: torch.randn(x.shape, dtype=torch.float64)} for x in layers}
    with differentiable(net, layers):
        spectrum = gram_spectrum(net, layers, batches, deltas, k=K, tolerance=0.0)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(spectrum.values[:K], values[:K], rtol=1e-6, atol=1e-12)
    for layer, block in zip(layers, dense.blocks(matrix), strict=True):
        assert spectrum.traces[layer.name] == pytest.approx(float(block.trace()), rel=1e-6)
        delta = deltas[layer.name][3].flatten()
        assert float(spectrum.projected[layer.name][3].square().sum()) == pytest.approx(
            float(delta @ block @ delta), rel=1e-6
        )
