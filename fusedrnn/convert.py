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
    """Replace every torch.nn RNN, LSTM, GRU and cell inside ``module`` by the fused one, in place.

    The new modules share the old ones' very Parameters, hooks, parametrizations and submodules, and
    keep their training flags, so optimizers and handles stay valid. A module that is used at
    several places stays one module. Left alone are subclasses of torch.nn's modules that users
    wrote, and modules with a ``forward`` of their own. What ``module.compile()`` made of a module
    that is replaced is not kept, as it calls the old one.

    Args:
        recompute: what the new RNNs, LSTMs and GRUs are given, see :class:`fusedrnn.LSTM`; cells
            have no use for it.

    Returns:
        ``module`` itself, or its replacement where it is a recurrent module.

    Raises:
        TypeError: ``module`` is no module.
    """
    return _swap(module, _FUSED, recompute)


def revert(module: nn.Module) -> nn.Module:
    """Replace every fused module inside ``module`` by torch.nn's: :func:`convert`'s inverse, with
    the same result and error."""
    return _swap(module, _PLAIN, False)


def _swap(root: nn.Module, classes: dict[type, type], recompute: bool) -> nn.Module:
    if not isinstance(root, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(root).__name__}")
    modules = list(root.modules())
    swapped = {
        m: _replacement(m, classes, recompute)
        for m in modules
        if _plain_class(m) in classes and "forward" not in vars(m)
    }
    for parent in modules:
        for name, child in parent._modules.items():
            if child in swapped:
                parent._modules[name] = swapped[child]
    return swapped.get(root, root)


def _plain_class(module: nn.Module) -> type:
    """The module's class; for a parametrized module, the class it had before."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _replacement(old: nn.Module, classes: dict[type, type], recompute: bool) -> nn.Module:
    """A module of the other class over the same attributes, dictionaries and parameters."""
    target = classes[_plain_class(old)]
    if is_parametrized(old):
        # torch gave this one instance a class of its own, which holds the parametrized properties.
        members = {
            key: value
            for key, value in vars(type(old)).items()
            if key not in ("__dict__", "__weakref__")
        }
        target = type(type(old).__name__, (target,), members)
    new = target.__new__(target)
    # The dictionaries of parameters, hooks and submodules are shared as they are: handles of hooks
    # refer to them, and what is assigned to either module's parameters is seen by both.
    new.__dict__.update(old.__dict__)
    new.__dict__.pop("_compiled_call_impl", None)  # bound to the old one
    new.__dict__.pop("recompute", None)  # torch.nn's have none
    if recompute and isinstance(new, nn.RNNBase):
        new.recompute = True
    for hook in new._load_state_dict_pre_hooks.values():
        # Alone of all hooks these may hold their module, by a weak reference, not be handed it.
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)
    if isinstance(new, nn.RNNBase):
        with torch.no_grad():
            new._init_flat_weights()  # torch.nn's own list of weights beside the parameters
    return new
