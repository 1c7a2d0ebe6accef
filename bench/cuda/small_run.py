"""A few steps of every cell on the GPU, forward and backward, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m bench.cuda.small_run

FUSEDRNN_CUDA_STRATEGY forces the kernels that are run. Exit code: 0; 1 where a result is far from
torch.nn's; 2 where there is no GPU; 3 where fusedrnn raises, as it does where it has no CUDA half.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
from torch import Tensor, nn

import fusedrnn

from .cudnn_table import MODULES

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
STEPS, BATCH, INPUTS = 4, 3, 5


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of its sum of squares."""
    x = x.clone().requires_grad_()
    output = module(x)[0]
    output.square().sum().backward()
    return [output, x.grad, *(p.grad for p in module.parameters())]


def far(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether some value is off by more than `tolerance` of the largest."""
    found, expected = found.detach().double(), expected.detach().double().to(found.device)
    difference = (found - expected).abs().max().item()
    return not difference <= tolerance * max(1.0, expected.abs().max().item())


def main(device: str = "cuda") -> int:
    """As :func:`run`, in exact float32: torch starts with TF32 for recurrent layers."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    try:
        return run(device)
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


def run(device: str) -> int:
    """Both directions; a size with a tail, a whole one, and one for several thread blocks."""
    wrong = 0
    for cell, dtype, hidden in product(MODULES, TOLERANCES, (17, 64, 100)):
        torch.manual_seed(0)
        exact = MODULES[cell](INPUTS, hidden, bidirectional=True).to(getattr(torch, dtype))
        fused = fusedrnn.convert(MODULES[cell](INPUTS, hidden, bidirectional=True))
        fused.load_state_dict(exact.state_dict())
        fused.to(device, getattr(torch, dtype))
        x = torch.randn(STEPS, BATCH, INPUTS).to(getattr(torch, dtype))
        expected = [r.detach() for r in results(exact.double(), x.double())]
        try:
            found = results(fused, x.to(device))
        except (RuntimeError, ValueError) as error:
            print(f"small_run: {cell}, {dtype}: {str(error).splitlines()[0]}")
            return 3
        bad = sum(far(f, e, TOLERANCES[dtype]) for f, e in zip(found, expected, strict=True))
        print(f"{cell} {dtype} H={hidden}: {'right' if not bad else f'{bad} results are wrong'}")
        wrong += bad
    return 1 if wrong else 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("small_run: there is no GPU here")
        sys.exit(2)
    sys.exit(main())
