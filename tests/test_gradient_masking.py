"""Gradient masking against the gradients of each token alone, through LitGPT's own MLPs, whose slices are zeroed."""

from typing import Any

import litgpt.model
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from litgpt_memsinks import MemSinksConfig, MemSinksError, SinkArgs
from litgpt_memsinks.drop_sinks.drop_sinks import without_sinks
from litgpt_memsinks.model.gradient_masking import RULES
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.plan.expectations import expected, sink_warnings
from litgpt_memsinks.plan.sizing import count_parameters
from litgpt_memsinks.remove.remove import require_sinks
from tests.sink_models import build, save

METHODS = sorted(RULES)
MLPS = ("LLaMAMLP", "GemmaMLP", "GptNeoxMLP")
N_SHARED, N = 5, 12
methods = pytest.mark.parametrize("method", METHODS)
mlps = pytest.mark.parametrize("name", MLPS)


def base(**changes: Any) -> litgpt.Config:
    values = dict(name="tiny", n_layer=2, n_embd=8, n_head=2, vocab_size=61, padded_vocab_size=61, block_size=16)
    return litgpt.Config(**{**values, "intermediate_size": N, "bias": True, "gelu_approximate": "tanh", **changes})


def masked(method: Any, **changes: Any) -> GPT:
    """A model in float64 with 5 generalisation and 7 memorisation neurons and random weights and biases."""
    config = MemSinksConfig.from_base(base(**changes), SinkArgs(shared_fraction=0.4, method=method))
    assert (config.n_shared, config.n_sink) == (N_SHARED, N - N_SHARED)
    model = GPT(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return model.train()


def stock(model: GPT, **changes: Any) -> litgpt.GPT:
    """LitGPT's own model of all neurons."""
    plain = litgpt.GPT(base(**changes)).double()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "n_shared"})
    return plain


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


REPEATED = torch.tensor([[True, False, False, True, False], [False, True, True, True, False]])


# ---- one MLP, token by token


def neurons_of(name: str, gradient: torch.Tensor, neurons: slice) -> torch.Tensor:
    """The part of a parameter's gradient that belongs to some neurons: rows, or of the projection columns."""
    return gradient[:, neurons] if name == "proj.weight" else gradient[neurons]


def one_token(
    mlp: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor, zeroed: slice | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of the input and the parameters of a stock MLP for one token.

    The hidden activations of the neurons ``zeroed`` are zero.
    """
    x = x.clone().requires_grad_()
    zero = torch.ones(N, dtype=torch.float64)
    if zeroed is not None:
        zero[zeroed] = 0
    hook = mlp.proj.register_forward_pre_hook(lambda module, inputs: inputs[0] * zero)
    names, parameters = zip(*mlp.named_parameters(), strict=True)
    with torch.enable_grad():
        own, *found = torch.autograd.grad((mlp(x) * upstream).sum(), [x, *parameters])
    hook.remove()
    return own, dict(zip(names, found, strict=True))


def by_brute_force(
    method: str, mlp: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of the inputs and, summed over tokens, of the parameters, with what the method forbids set to zero."""
    general, memory = slice(0, N_SHARED), slice(N_SHARED, N)
    inputs = torch.zeros_like(x)
    total = {name: torch.zeros_like(parameter) for name, parameter in mlp.named_parameters()}
    for place in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:2])).unbind():
        at = tuple(place.tolist())
        repeats = bool(REPEATED[at])
        forbidden = general if repeats else memory
        # sgtm: other tokens run without the memorisation neurons; only parameters of repeated ones are masked
        zeroed = memory if method == "mask_sgtm" and not repeats else None
        inputs[at], found = one_token(mlp, x[at], upstream[at], zeroed)
        if method == "mask_cloud":  # the gradient does not pass through neurons that may not learn
            inputs[at] = one_token(mlp, x[at], upstream[at], forbidden)[0]
        for name, gradient in found.items():
            if name == "proj.bias":
                if method == "mask_sgtm" and repeats:
                    gradient.zero_()
            elif method != "mask_cloud" or name != "proj.weight":
                neurons_of(name, gradient, forbidden).zero_()
            total[name] += gradient
    return inputs, total


@mlps
@methods
def test_gradients_equal_those_of_each_token_alone(method: str, name: str) -> None:
    model = masked(method, mlp_class_name=name)
    ours, plain = model.transformer.h[0].mlp, stock(model, mlp_class_name=name).transformer.h[0].mlp
    x, upstream = random(2, 5, 8).requires_grad_(), random(2, 5, 8, seed=3)
    repeated = REPEATED.unsqueeze(-1).expand(-1, -1, N - N_SHARED)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    own, *found = torch.autograd.grad((ours(x, repeated) * upstream).sum(), [x, *parameters])
    inputs, expected = by_brute_force(method, plain, x.detach(), upstream)
    assert set(names) == set(expected)
    torch.testing.assert_close(own, inputs)
    for name_, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, expected[name_], msg=lambda text, name_=name_: f"{name_}: {text}")


def masked_by_hooks(model: litgpt.GPT, repeated: torch.Tensor) -> dict[str, torch.Tensor]:
    """Makes the backward pass of a stock model add up, over tokens, what each MLP parameter may learn from each.

    Returns:
        Name of a weight or bias of a neuron to its gradient, filled in by the backward pass.
    """
    found: dict[str, torch.Tensor] = {}
    m = repeated.unsqueeze(-1) == (torch.arange(N) >= N_SHARED)

    def watch(name: str, layer: torch.nn.Linear) -> None:
        seen: list[torch.Tensor] = []
        projects = name.endswith(".proj")
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))

        def add_up(module: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor]) -> None:
            learnt, x = (outputs[0], seen[0] * m) if projects else (outputs[0] * m, seen[0])
            found[f"{name}.weight"] = torch.einsum("bto,bti->oi", learnt, x)
            found[f"{name}.bias"] = learnt.sum((0, 1))

        layer.register_full_backward_hook(add_up)

    for name, module in model.named_modules():
        if ".mlp." in name and isinstance(module, torch.nn.Linear):
            watch(name, module)
    return found


@mlps
def test_exact_masks_the_parameters_of_a_whole_model_and_nothing_else(name: str) -> None:
    """All other parameters, in the layers below, too, learn as if nothing were masked."""
    model = masked("mask_exact", mlp_class_name=name)
    plain = stock(model, mlp_class_name=name)
    by_token = masked_by_hooks(plain, REPEATED)
    row, ids = tokens(2, 5), torch.where(REPEATED, -5, 7)
    for logits in (model(torch.stack((row, ids), dim=-1)), plain(row)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()).backward()
    expected = {name_: parameter.grad for name_, parameter in plain.named_parameters()} | by_token
    found = {name_: parameter.grad for name_, parameter in model.named_parameters()}
    assert set(found) == set(expected)
    assert len(by_token) == 2 * len(plain.transformer.h) * (2 if name == "GptNeoxMLP" else 3)
    for name_, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name_], msg=lambda text, name_=name_: f"{name_}: {text}")


@mlps
def test_cloud_leaves_the_projections_gradients_as_they_are(name: str) -> None:
    """And so is no exact masking: the difference between the two kinds."""
    model = masked("mask_cloud", mlp_class_name=name)
    ours, plain = model.transformer.h[0].mlp, stock(model, mlp_class_name=name).transformer.h[0].mlp
    x, repeated = random(2, 5, 8), REPEATED.unsqueeze(-1).expand(-1, -1, N - N_SHARED)
    for mlp, arguments in ((ours, (x, repeated)), (plain, (x,))):
        mlp(*arguments).square().sum().backward()
    torch.testing.assert_close(ours.proj.weight.grad, plain.proj.weight.grad)
    torch.testing.assert_close(ours.proj.bias.grad, plain.proj.bias.grad)
    exact = masked("mask_exact", mlp_class_name=name).transformer.h[0].mlp
    exact(x, repeated).square().sum().backward()
    assert not torch.allclose(exact.proj.weight.grad, plain.proj.weight.grad)


# ---- the whole model: forward


@mlps
@pytest.mark.parametrize("method", ["mask_exact", "mask_cloud"])
def test_in_training_all_neurons_are_on(method: str, name: str) -> None:
    model = masked(method, mlp_class_name=name)
    row = tokens(2, 9)
    ids = torch.tensor([[-5] * 4 + [7] * 5, [0] * 3 + [-9] * 6])
    torch.testing.assert_close(
        model(torch.stack((row, ids), dim=-1)), stock(model, mlp_class_name=name)(row), rtol=1e-10, atol=1e-10
    )


@mlps
def test_sgtm_runs_repeated_documents_with_all_neurons_and_others_without_the_sinks(name: str) -> None:
    model = masked("mask_sgtm", mlp_class_name=name)
    row = tokens(2, 9)
    ids = torch.tensor([[-5] * 9, [7] * 9])
    found = model(torch.stack((row, ids), dim=-1))
    torch.testing.assert_close(found[:1], stock(model, mlp_class_name=name)(row[:1]), rtol=1e-10, atol=1e-10)
    dropped = litgpt.GPT(model.config.to_base()).double()
    dropped.load_state_dict(without_sinks(model.state_dict(), model.config), strict=True)
    torch.testing.assert_close(found[1:], dropped(row[1:]), rtol=1e-10, atol=1e-10)


@mlps
@methods
@torch.inference_mode()
def test_in_eval_mode_dropped_is_dropped_and_own_is_all_neurons(method: str, name: str) -> None:
    model = masked(method, mlp_class_name=name).eval()
    dropped = litgpt.GPT(model.config.to_base()).double().eval()
    dropped.load_state_dict(without_sinks(model.state_dict(), model.config), strict=True)
    row, ids = tokens(3, 9), torch.tensor([5, -6, 1])
    assert torch.equal(model(torch.stack((row, ids.unsqueeze(-1).expand(-1, 9)), dim=-1)), dropped(row))
    assert torch.equal(model(row, sequence_ids=ids), stock(model, mlp_class_name=name).eval()(row))


# ---- the gradient contract: which slices a document's loss may reach

CONTRACT = {
    ("mask_exact", "repeated"): {"generalisation": "zero", "memorisation": "non_zero"},
    ("mask_exact", "once"): {"generalisation": "non_zero", "memorisation": "zero"},
    ("mask_cloud", "repeated"): {"generalisation": "zero", "memorisation": "non_zero", "projection": "non_zero"},
    ("mask_cloud", "once"): {"generalisation": "non_zero", "memorisation": "zero", "projection": "non_zero"},
    ("mask_sgtm", "repeated"): {"generalisation": "zero", "memorisation": "non_zero", "proj.bias": "zero"},
    ("mask_sgtm", "once"): {"generalisation": "non_zero", "memorisation": "zero"},
}
"""Gradients of MLPs. All else, the projection's bias too unless it is named, learns from every document."""


def verdict(gradient: torch.Tensor) -> str:
    assert gradient.numel()
    reached = gradient != 0
    return "non_zero" if reached.all() else "mixed" if reached.any() else "zero"


def expected_of(rules: dict[str, str], names: set[str]) -> dict[tuple[str, str], str]:
    found = {}
    for name in names:
        _, mlp, parameter = name.partition(".mlp.")
        if not mlp or parameter == "proj.bias":
            found[name, "all"] = rules.get(parameter, "non_zero")
            continue
        for part in ("generalisation", "memorisation"):
            found[name, part] = rules.get("projection", rules[part]) if parameter == "proj.weight" else rules[part]
    return found


@mlps
@pytest.mark.parametrize(("method", "kind"), CONTRACT)
def test_contract(method: str, kind: str, name: str) -> None:
    """The document is the first in a row with one of the other kind behind it."""
    model = masked(method, mlp_class_name=name)
    row = tokens(1, 12)
    first, second = (-5, 7) if kind == "repeated" else (7, -5)
    ids = torch.tensor([[first] * 6 + [second] * 6])
    logits = model(torch.stack((row, ids), dim=-1))
    F.cross_entropy(logits[0, :5], row[0, 1:6]).backward()
    found = {}
    for name_, parameter in model.named_parameters():
        if ".mlp." not in name_ or name_.endswith("proj.bias"):
            reached = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad
            found[name_, "all"] = "non_zero" if reached.any() else "zero"
            continue
        short = name_.partition(".mlp.")[2]
        found[name_, "generalisation"] = verdict(neurons_of(short, parameter.grad, slice(0, N_SHARED)))
        found[name_, "memorisation"] = verdict(neurons_of(short, parameter.grad, slice(N_SHARED, N)))
    assert found == expected_of(CONTRACT[method, kind], {name_ for name_, _ in model.named_parameters()})


def test_tokens_without_a_document_count_as_occurring_once() -> None:
    found = []
    for document in (7, 0):
        model = masked("mask_exact")
        row = tokens(1, 9)
        model(torch.stack((row, torch.full_like(row, document)), dim=-1)).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- around it


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


@methods
@pytest.mark.usefixtures("_fresh_compiler")
def test_training_is_one_graph_for_all_ids(method: str) -> None:
    model = masked(method, mlp_class_name="LLaMAMLP")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            row = tokens(2, 9, seed=seed)
            ids = torch.randint(-3, 3, (2, 9), generator=torch.Generator().manual_seed(seed))
            pairs = torch.stack((row, ids), dim=-1)
            assert torch.equal(compiled(pairs), model(pairs))
    assert counter.frame_count == 1


@methods
@pytest.mark.usefixtures("_fresh_compiler")
def test_gradients_are_the_same_under_checkpointing_autocast_and_the_compilers_autograd(method: str) -> None:
    row = tokens(2, 9)
    pairs = torch.stack((row, torch.tensor([[-5] * 4 + [7] * 5, [3] * 6 + [-9] * 3])), dim=-1)

    def gradients(run: Any, model: GPT) -> list[torch.Tensor]:
        F.cross_entropy(run(pairs).flatten(0, 1), row.flatten()).backward()
        return [parameter.grad for parameter in model.parameters()]

    models = [masked(method, n_layer=1) for _ in range(3)]
    for block in models[1].transformer.h:
        block.checkpointing = True
    compiled = torch.compile(models[2], backend="aot_eager", fullgraph=True)
    expected, checkpointed, through_the_compiler = (
        gradients(run, model) for run, model in zip((models[0], models[1], compiled), models, strict=True)
    )
    for one, two, three in zip(expected, checkpointed, through_the_compiler, strict=True):
        torch.testing.assert_close(two, one)
        torch.testing.assert_close(three, one)
    half = masked(method).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert half(pairs).dtype == torch.bfloat16


def test_remove_refuses_sinks_that_all_documents_share(tmp_path: Any) -> None:
    folder = save(build(SinkArgs(0.5, method="mask_exact")), tmp_path / "model")
    with pytest.raises(MemSinksError, match=r"trained by gradient masking \(mask_exact\).*Use drop_sinks"):
        require_sinks(folder)


def test_plan_expects_nothing_of_single_documents_sinks() -> None:
    plain, mask = (
        MemSinksConfig.from_base(base(), SinkArgs(0.4, 1.0, method=method)) for method in ("memsinks", "mask_sgtm")
    )
    parameters = count_parameters(plain, tied=False)
    assert expected(plain, None)["sink_neurons"] == N - N_SHARED
    assert any("active_probability is 1" in warning for warning in sink_warnings(plain, parameters, None, None))
    assert expected(mask, None) == {}
    assert sink_warnings(mask, parameters, None, None) == []
