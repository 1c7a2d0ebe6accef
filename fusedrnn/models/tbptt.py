"""Truncated back-propagation through time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def detached(state: Any) -> Any:
    """The state without its past: a tensor, None, or tuples and lists of them."""
    if isinstance(state, (tuple, list)):
        parts = [detached(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return None if state is None else state.detach()


def truncated_bptt(
    module: Callable[..., tuple[Any, Any]],
    chunks: Iterable[Tensor | PackedSequence | tuple[Any, ...]],
    hx: Any = None,
) -> Iterator[tuple[Any, Any, Any]]:
    """Run a module over an endless stream, chunk by chunk: the state is carried on, gradients are
    not (Williams & Peng 1990, with equal chunk and window).

    Args:
        module: called as ``module(input, hx)``, gives an output and the state after it: a fusedrnn
            or torch.nn layer, an :class:`Encoder`'s stack, a model of your own.
        chunks: inputs (tensors or PackedSequences of the same rows), or tuples whose first member
            is the input.
        hx: the state before the first chunk; None for zeros.

    Yields:
        The chunk as it came, the output over it, and the detached state after it, which is what the
        next chunk starts from. Call backward before asking for the next.
    """
    for chunk in chunks:
        whole = isinstance(chunk, (Tensor, PackedSequence))
        output, hx = module(chunk if whole else chunk[0], hx)
        hx = detached(hx)
        yield chunk, output, hx
