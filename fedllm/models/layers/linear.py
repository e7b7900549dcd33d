"""A model's linear layers, and GPT-2's `Conv1D` seen as one: y = x W + b with W (in, out) is y = x (W^T)^T + b."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fedllm.models.layers.quantized_linear import QuantizedLinear


class Turned(nn.Linear):
    """A `Conv1D` as a linear layer: `weight` (out, in) is a view of the layer's own (in, out), which stays where it
    is."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        own, bias = layer.weight, layer.bias
        assert isinstance(own, Tensor) and isinstance(bias, nn.Parameter)
        self.in_features, self.out_features = own.shape
        self.weight, self.bias = nn.Parameter(own.detach().T, requires_grad=False), bias


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """By path and in the model's order, without the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = module
        elif _is_conv1d(module):
            found[name] = Turned(module)
    return found


def replace_forward(model: nn.Module, name: str, forward: Callable[[Tensor], Tensor]) -> None:
    """Let a layer compute something else; its name, weights and hooks stay."""
    model.get_submodule(name).forward = forward


def base_weight(layer: nn.Linear, name: str, model: nn.Module | None) -> Tensor:
    """A frozen layer's weight (out, in): that of the same layer of `model`, if there is one, or its own; a quantised
    layer's always its own."""
    if model is None or isinstance(layer, QuantizedLinear):
        return layer.weight.detach()
    weight = model.get_parameter(f"{name}.weight").detach()
    return weight.T if isinstance(layer, Turned) else weight


def as_stored(layer: nn.Linear, weight: Tensor) -> Tensor:
    """A weight (out, in) of a layer in the shape in which the model keeps it."""
    return weight.T.contiguous() if isinstance(layer, Turned) else weight


def _is_conv1d(module: nn.Module) -> bool:
    """Told by its name, for importing transformers takes seconds where no model is loaded."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
