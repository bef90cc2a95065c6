"""The frozen writer against the trained one: the same outputs and gradients, but for the compression."""

import torch

from tests.models.memory.conformance_cases import CASES, make, make_x, whole


def gradients(module):
    """Of every parameter that has one, by name."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    loss = module(make_x(), None, whole(packed=True))[0].square().sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_a_frozen_writer_learns_nothing_and_changes_nothing_else():
    settings = dict(CASES["neurocache, nearest"].settings["neurocache"])
    trained = make("neurocache, nearest")
    frozen = make("neurocache, nearest", neurocache={**settings, "writer": "frozen"})
    want, got = gradients(trained), gradients(frozen)
    assert want.pop("w_down.weight").abs().max() > 0
    assert set(got) == set(want)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-12, atol=1e-12)
    assert not frozen.w_down.weight.requires_grad


def test_an_entry_sends_no_gradient_to_what_it_was_made_of():
    module, x = make("neurocache, nearest"), make_x().requires_grad_()
    y = module(x, None, whole())[0]
    (dx,) = torch.autograd.grad(y[:, -1].square().sum(), x)
    assert dx[:, -1].abs().max() > 0 and not dx[:, :-1].any()
