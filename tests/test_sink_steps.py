"""Sinks with a learning rate and a weight decay of their own: AdamW on whole matrices against AdamW on the slices."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.strategies import FSDPStrategy
from litgpt.config import Config

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.pretrain.sink_steps import give_sinks_their_steps, own_step
from tests.console import TINY_MODEL

LR, DECAY, STEPS = 0.01, 0.1, 4
# which slices of 64 neurons with 16 shared ones belong to sinks; PyTorch counts rows first
SINKS = {"mlp.fc_1.weight": (slice(16, None), slice(None)), "mlp.proj.weight": (slice(None), slice(16, None))}
SINKS |= {"mlp.fc_2.weight": SINKS["mlp.fc_1.weight"]}


def model_with(**settings: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(0.25, 0.3, **settings))).double()


def trained(model: GPT, lr: float = LR, decay: float = DECAY, ours: bool = False, **options: Any) -> GPT:
    """Some steps of AdamW on gradients that are the same for every model, at a learning rate that falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, **options)
    if ours:
        give_sinks_their_steps(run_of(model, optimizer))
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        optimizer.param_groups[0]["lr"] = lr / (step + 1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return model


def run_of(model: GPT, optimizer: Any, strategy: Any = None) -> Any:
    state = {"model": model, "optimizer": SimpleNamespace(optimizer=optimizer)}
    return SimpleNamespace(config=model.config, state=state, fabric=SimpleNamespace(strategy=strategy))


def weights(model: GPT) -> dict[str, torch.Tensor]:
    """All weights, those of hidden neurons parted into shared ones and sinks."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        slices = next((slices for end, slices in SINKS.items() if name.endswith(end)), None)
        if slices is None:
            found[name] = weight
        else:
            shared = torch.ones_like(weight, dtype=torch.bool)
            shared[slices] = False
            found |= {f"{name}, shared": weight[shared], f"{name}, sinks": weight[~shared]}
    return found


@pytest.mark.parametrize(("factor", "decay"), [(3.0, None), (0.1, None), (1.0, 0.0), (1.0, 0.7), (5.0, 0.2)])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_sinks_are_trained_as_by_an_optimizer_of_their_own(
    factor: float, decay: float | None, options: dict[str, Any]
) -> None:
    ours = weights(trained(model_with(learning_rate=factor, weight_decay=decay), ours=True, **options))
    usual = weights(trained(model_with(), **options))
    own = weights(trained(model_with(), LR * factor, DECAY if decay is None else decay, **options))
    changed = {name for name in ours if not torch.allclose(ours[name], usual[name], rtol=0, atol=1e-9)}
    assert changed == {name for name in ours if name.endswith(", sinks")}
    assert len(changed) == 6
    for name in changed:
        torch.testing.assert_close(ours[name], own[name], rtol=0, atol=1e-12)


def test_without_settings_the_optimizer_is_left_alone() -> None:
    for model in (model_with(), GPT(MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(1.0, learning_rate=2.0)))):
        optimizer = torch.optim.SGD(model.parameters())
        give_sinks_their_steps(run_of(model, optimizer))
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_what_has_no_gradient_stays() -> None:
    model = model_with(learning_rate=3.0, weight_decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    give_sinks_their_steps(run_of(model, optimizer))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer.step()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@given(
    st.floats(1e-5, 0.1), st.floats(0, 1), st.floats(0.01, 10), st.floats(0, 1), st.lists(st.floats(-3, 3), min_size=2)
)
def test_own_step_is_the_definition(lr: float, decay: float, factor: float, own: float, numbers: list[float]) -> None:
    for weight, update in pairwise(numbers):
        before = torch.tensor(weight, dtype=torch.float64)
        after = (1 - lr * decay) * before - lr * update
        expected = (1 - factor * lr * own) * weight - factor * lr * update
        assert own_step(before, after, lr, decay, factor, own).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("settings", [{"learning_rate": 2.0}, {"weight_decay": 0.0}], ids=str)
def test_other_optimizers_and_fsdp1_are_refused(settings: dict[str, float]) -> None:
    model = model_with(**settings)
    with pytest.raises(MemSinksError, match=r"torch.optim.AdamW only, but the optimizer is SGD"):
        give_sinks_their_steps(run_of(model, torch.optim.SGD(model.parameters())))
    with pytest.raises(MemSinksError, match=r"FSDP1, .* Set launch.strategy to fsdp"):
        give_sinks_their_steps(run_of(model, torch.optim.AdamW(model.parameters()), FSDPStrategy()))
