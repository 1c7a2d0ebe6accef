"""fusedrnn: drop-in RNN, LSTM and GRU for PyTorch, with fused kernels.

``fusedrnn.RNN``, ``LSTM``, ``GRU`` and their cells take the place of ``torch.nn``'s;
``fusedrnn.convert(model)`` swaps those inside a model. Beyond torch.nn: ``lengths`` and ``reset``
in the kernel, double backward, ``torch.func``, ``torch.compile(fullgraph=True)``.
``fusedrnn.models`` builds encoders, attention and decoders on them.
"""

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


def empty_cache() -> None:
    """Give the CPU memory that fusedrnn keeps between calls back to the system.

    The scratch of a call, and its tensors once nobody holds them any more, are kept for the next
    call, 256 MiB at most in a process: fresh memory costs a page fault every 4 KiB.
    """
    _C.empty_cache()
