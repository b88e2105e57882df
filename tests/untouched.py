"""What must be as it was: a model and the process around it, bit for bit."""

import warnings

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
)


def everything(model):
    """As far as it can be listed; a test that knows of more adds it."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return {
        "objects": {name: id(p) for name, p in parameters.items()},
        "versions": {name: p._version for name, p in parameters.items()},
        "values": {name: _copy(tensor) for name, tensor in (parameters | buffers).items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: (id(p.grad), _copy(p.grad)) for name, p in parameters.items()},
        "buffers": {name: id(b) for name, b in buffers.items()},
        "state_dict": list(model.state_dict()),
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "attributes": [list(vars(module)) for module in model.modules()],
        "forwards": [vars(module).get("forward") for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [[len(getattr(module, name)) for name in HOOKS] for module in model.modules()],
        "random": torch.get_rng_state(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "modes": torch._C._len_torch_function_stack(),
        "local table": dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        "global table": dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        "filters": list(warnings.filters),
    }


def _copy(tensor):
    """Of a tensor that is spread over processes its part here; of one that is away, or in a class of its own, none."""
    if tensor is None:
        return None
    tensor = getattr(tensor, "_local_tensor", tensor).detach()
    return None if tensor.is_meta or type(tensor) is not torch.Tensor else tensor.clone()


def same(one, other):
    """Whether two values are equal, and every tensor in them bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def changes(before, after):
    """Names of what has changed: none is what tests ask for."""
    return [what for what, value in before.items() if not same(value, after[what])]
