"""fusedrnn: drop-in RNN, LSTM and GRU for PyTorch, with fused kernels.

``fusedrnn.RNN``, ``LSTM``, ``GRU`` and their cells take the place of ``torch.nn``'s;
``fusedrnn.convert(model)`` swaps those inside a model. Beyond torch.nn: ``lengths`` and ``reset``
in the kernel, ``torch.compile(fullgraph=True)``, ``recompute``; double backward, forward mode and
``torch.func`` for every module.
``fusedrnn.models`` builds encoders, attention and decoders on them.
"""

import torch

from fusedrnn import autograd, functional, models, reference
from fusedrnn._ops import _C
from fusedrnn.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.convert import convert, revert
from fusedrnn.modules import GRU, LSTM, RNN
from fusedrnn.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "autograd",
    "convert",
    "cpu_isas",
    "cuda_strategy",
    "empty_cache",
    "functional",
    "models",
    "reference",
    "revert",
]


def cpu_isas() -> list[str]:
    """The instruction sets that are compiled in and usable on this machine.

    The environment variable FUSEDRNN_CPU_ISA forces one of them.
    """
    return _C.cpu_isas()


def cuda_strategy(module: RNN | LSTM | GRU, dtype: torch.dtype | None = None) -> str:
    """How a CUDA device runs the recurrence of ``module``'s layers.

    ``"per_step"``: a matrix product and a kernel for every step. ``"one_cta"``: one kernel for up
    to 256 steps, whose thread blocks each keep all of W_hh and a row or two of the batch; it needs
    ``hidden_size <= 128``, no ``proj_size`` and another dtype than float64. ``"persistent"``: one
    kernel for up to 256 steps, whose thread blocks keep W_hh together and exchange the state at
    each step; it needs ``hidden_size <= 1024`` (2048 in half precision), no ``proj_size`` and
    another dtype than float64, and where a GPU has too few multiprocessors for all blocks at a
    time, steps are taken one by one instead. In float32 it follows cuDNN's switch for TF32; with
    the switch off, an infinite weight or state may give NaN where others give infinity.
    ``dtype`` is what the module computes in, if not its parameters' own (under autocast). On a
    machine without a GPU this tells what one would do.

    The environment variable FUSEDRNN_CUDA_STRATEGY, read at every call, forces one of them;
    ``auto`` or nothing leaves the choice to fusedrnn. Raises ValueError, as the layers do then,
    where it is no strategy's name or names one that cannot run the layer.
    """
    if not isinstance(module, RNN | LSTM | GRU):
        raise TypeError(f"module: expected fusedrnn.RNN, LSTM or GRU, got {type(module).__name__}")
    kept = module.weight_ih_l0.dtype if dtype is None else dtype
    return _C.cuda_strategy(module.hidden_size, module.proj_size, kept)


def empty_cache() -> None:
    """Give the CPU memory that fusedrnn keeps between calls back to the system.

    The scratch of a call, and its tensors once nobody holds them any more, are kept for the next
    call, 256 MiB at most in a process: fresh memory costs a page fault every 4 KiB.
    """
    _C.empty_cache()
