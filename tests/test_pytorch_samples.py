"""PyTorch's own samples, and samples of errors, for the modules that ours replace."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
import oracle

NAMES = ("RNN", "LSTM", "GRU")
ALL_NAMES = (*NAMES, *(f"{name}Cell" for name in NAMES))


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


try:
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    # That import forbids to set torch.backends' switches, in this whole process.
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    INFOS = {i.module_cls.__name__: i for i in module_db if i.module_cls.__name__ in ALL_NAMES}
except ModuleNotFoundError as error:  # torch.testing's own needs, expecttest first
    if error.name != "expecttest":
        raise
    INFOS = {}
needs_samples = pytest.mark.skipif(
    not INFOS, reason="expecttest, which PyTorch's samples need, is missing"
)


def cloned(value: Any) -> Any:
    """A sample's arguments as leaves of their own."""
    if isinstance(value, PackedSequence):
        return value._replace(data=cloned(value.data))
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(cloned(v) for v in value)
    return value


@needs_samples
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_pytorchs_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    info = INFOS[name]
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    if name in NAMES:
        samples += info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training,
            with_packed_sequence=True,
        )  # fmt: skip
    assert len(samples) >= 2
    for sample in samples:
        build, call = sample.constructor_input, sample.forward_input
        theirs = getattr(nn, name)(*build.args, **build.kwargs, dtype=dtype).train(training)
        found = []
        for net in (oracle.twin(theirs), theirs, oracle.twin(theirs, torch.float64)):
            args = to_dtype(cloned(call.args), next(net.parameters()).dtype)
            outputs = net(*args, **call.kwargs)
            torch.manual_seed(2)
            dys = [torch.randn_like(t, dtype=torch.float32) for t in oracle.tensors(outputs)]
            leaves = {f"argument {i}": t for i, t in enumerate(oracle.tensors(args))}
            found.append(oracle.results(outputs, leaves | dict(net.named_parameters()), dys))
        oracle.agree(*found, sample.desc)
        if sample.reference_fn is not None and not isinstance(call.args[0], PackedSequence):
            # PyTorch's own oracle of this sample: one row without a batch dimension.
            ours = oracle.twin(theirs)
            mine = ours(*call.args, **call.kwargs)
            expected = sample.reference_fn(ours, *call.args, **call.kwargs)
            torch.testing.assert_close(oracle.tensors(mine), oracle.tensors(expected))


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (PackedSequence, Tensor)):
        if isinstance(value, PackedSequence):
            return value._replace(data=to_dtype(value.data, dtype))
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    return (
        type(value)(to_dtype(v, dtype) for v in value)
        if isinstance(value, (tuple, list))
        else value
    )


@needs_samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_pytorchs_error_samples(name: str, dtype: torch.dtype) -> None:
    info = INFOS[name]
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    assert len(samples) >= 4
    for sample in samples:
        build = sample.module_error_input.constructor_input
        call = sample.module_error_input.forward_input
        cls, plain = getattr(fusedrnn, name), getattr(nn, name)

        def run(which: type, build: Any = build, call: Any = call, sample: Any = sample) -> None:
            net = which(*build.args, **build.kwargs)
            if sample.error_on != ModuleErrorEnum.CONSTRUCTION_ERROR:
                net(*call.args, **call.kwargs)

        with pytest.raises(sample.error_type) as caught:
            run(cls)
        assert re.search(sample.error_regex, str(caught.value)), caught.value
        assert oracle.outcome(lambda run=run, cls=cls: run(cls)) == oracle.outcome(
            lambda run=run, plain=plain: run(plain)
        )
