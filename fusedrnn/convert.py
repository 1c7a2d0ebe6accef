"""Swap torch.nn's recurrent modules for the fused ones inside a model, and back."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fusedrnn.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.modules import GRU, LSTM, RNN

__all__ = ["convert", "revert"]

_FUSED: dict[type, type] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
_PLAIN: dict[type, type] = {fused: plain for plain, fused in _FUSED.items()}


def convert(module: nn.Module, *, recompute: bool = False) -> nn.Module:
    """Make every torch.nn RNN, LSTM, GRU and cell inside ``module`` the fused one, in place.

    Modules inside another stay the very objects they are and change their class: parameters, hooks,
    parametrizations, training flags and whoever else refers to them, a list or torch.compile's
    wrapper, go on as before. A ``module`` that is recurrent itself is left as it is, and a new one
    comes back, which shares its Parameters, hooks, parametrizations and submodules; what
    ``module.compile()`` made of it is not shared, as it calls the old one. Left alone are
    subclasses of torch.nn's modules that users wrote, and modules with a ``forward`` of their own.

    Args:
        module: any module, a recurrent one or one that has some inside.
        recompute: whether every fused RNN, LSTM and GRU inside, the new ones and those that were
            there, is to keep no gates for the backward pass, see :class:`fusedrnn.LSTM`; False
            leaves those that were there as they are. Cells have no use for it.

    Returns:
        ``module`` itself, or the new module where it is a recurrent one.

    Raises:
        TypeError: ``module`` is no module.
    """
    converted = _swap(module, _FUSED)
    if recompute:
        for part in converted.modules():
            if isinstance(part, RNN | LSTM | GRU):
                part.recompute = True
    return converted


def revert(module: nn.Module) -> nn.Module:
    """Make every fused module inside ``module`` torch.nn's: :func:`convert`'s inverse, with the
    same result and error."""
    return _swap(module, _PLAIN)


def _swap(root: nn.Module, classes: dict[type, type]) -> nn.Module:
    if not isinstance(root, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(root).__name__}")
    result = root
    for module in list(root.modules()):
        target = classes.get(_plain_class(module))
        if target is None or "forward" in vars(module):
            continue
        if module is root:
            result = _twin(root)
        _become(result if module is root else module, target)
    return result


def _plain_class(module: nn.Module) -> type:
    """The module's class; for a parametrized module, the class it had before."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _become(module: nn.Module, target: type) -> None:
    """Make the module one of the target class, which keeps the same attributes."""
    if is_parametrized(module):
        # torch gave this one instance a class of its own, which holds the parametrized properties.
        members = {
            key: value
            for key, value in vars(type(module)).items()
            if key not in ("__dict__", "__weakref__")
        }
        target = type(type(module).__name__, (target,), members)
    module.__class__ = target
    vars(module).pop("recompute", None)  # torch.nn's have none
    if isinstance(module, nn.RNNBase):
        with torch.no_grad():
            module._init_flat_weights()  # torch.nn's own list of weights beside the parameters


def _twin(old: nn.Module) -> nn.Module:
    """Another module over the same dictionaries of parameters, hooks and submodules, as they are:
    handles of hooks refer to them, and what is assigned to either's parameters is seen by both."""
    new = object.__new__(type(old))
    new.__dict__.update(old.__dict__)
    new.__dict__.pop("_compiled_call_impl", None)  # bound to the old one
    for hook in new._load_state_dict_pre_hooks.values():
        # Alone of all hooks these may hold their module, by a weak reference, not be handed it.
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)
    return new
