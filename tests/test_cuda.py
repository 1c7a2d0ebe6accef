"""On a GPU: the operators against cuDNN, and what only a GPU can show.

TF32 is off for both sides. The same cases run emulated on the host in test_cuda_emulated.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cuda_cases
import fusedrnn
import oracle
from fusedrnn import _C

WHY_NOT = None
if not torch.cuda.is_available():
    WHY_NOT = "needs a CUDA GPU, and a torch that knows it"
elif _C.build_info()["cuda"] == "no":
    WHY_NOT = "fusedrnn was built without its CUDA half (FUSEDRNN_CUDA=1 builds it)"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

T, B, INPUT, HIDDEN = 12, 5, 16, 40


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # as torch starts
    torch.backends.cuda.matmul.fp32_precision = "none"


@cuda_cases.each_case
def test_against_cudnn(strategy: str, mode: str, form: str, dtype: torch.dtype) -> None:
    call = cuda_cases.Call(mode, dtype, **cuda_cases.FORMS[form])
    cuda_cases.check(torch.ops.fusedrnn, call, "cuda")


@pytest.mark.parametrize("strategy", ["persistent"], indirect=True)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_tf32(strategy: str, mode: str, switches: Callable[[str, str], None]) -> None:
    """As torch starts: the other tests turn it off."""
    cuda_cases.check_tf32(torch.ops.fusedrnn, mode, switches, "cuda")


# Sums over many values, and more rows than a block has.
SIZES = {
    "per_step": [(1, 200), (33, 65), (64, 256)],
    "one_cta": [(1, 128), (33, 65), (500, 64)],
    "persistent": [(1, 256), (33, 200), (64, 512), (70, 650), (200, 1024)],
}


@cuda_cases.each_of(
    [
        (strategy, mode, dtype, *size)
        for strategy, sizes in SIZES.items()
        for _, mode, dtype in cuda_cases.smooth(strategy)
        for size in sizes
    ],
    *("mode", "dtype", "batch", "hidden_size"),
)
def test_sizes(strategy: str, mode: str, dtype: torch.dtype, batch: int, hidden_size: int) -> None:
    call = cuda_cases.Call(
        mode, dtype, both=True, batch=batch, hidden_size=hidden_size, steps=20, input_size=96
    )
    cuda_cases.check(torch.ops.fusedrnn, call, "cuda")


each_strategy = cuda_cases.each_of([(s, d[0]) for s, d in cuda_cases.DTYPES_OF.items()], "dtype")
each_dtype = cuda_cases.each_of(
    [(s, dtype) for s, dtypes in cuda_cases.DTYPES_OF.items() for dtype in dtypes], "dtype"
)


def net(cell: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return getattr(fusedrnn, cell)(INPUT, HIDDEN, device="cuda", dtype=dtype, **options)


def train(module: nn.Module, x: Tensor, **given: Any) -> list[Tensor]:
    """The output and every gradient of its sum of squares; nothing that holds the graph, whose
    nodes would go on belonging to the stream they were made on."""
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    y = module(leaves[0], **given)[0]
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("cell", oracle.CELLS)
@each_strategy
def test_modules(strategy: str, dtype: torch.dtype, cell: str) -> None:
    """A stack, both directions, batch_first, hx, PackedSequence: as torch.nn with cuDNN."""
    theirs = getattr(nn, cell)(INPUT, HIDDEN, 2, bidirectional=True, batch_first=True)
    theirs.to("cuda", dtype)
    exact, ours = oracle.twin(theirs, torch.float64).cuda(), oracle.twin(theirs).cuda()
    x = torch.randn(B, T, INPUT, device="cuda", dtype=dtype)
    lengths = torch.tensor([T, 9, 9, 2, 1])
    pack = nn.utils.rnn.pack_padded_sequence
    for form in (lambda t: t, lambda t: pack(t, lengths, batch_first=True)):
        found = []
        for module in (ours, theirs, exact):
            leaf = x.to(module.weight_ih_l0.dtype).requires_grad_()
            outputs = module(form(leaf))
            cotangents = [torch.ones_like(t) for t in oracle.tensors(outputs)]
            leaves = {"x": leaf, **dict(module.named_parameters())}
            found.append(oracle.results(outputs, leaves, cotangents))
        oracle.agree(*found, what=cell)


@each_dtype
@pytest.mark.parametrize("cell", oracle.CELLS)
def test_the_same_bits_at_every_run(strategy: str, cell: str, dtype: torch.dtype) -> None:
    module = net(cell, dtype, bidirectional=True)
    x = torch.randn(200, 64, INPUT, device="cuda", dtype=dtype)
    first = train(module, x)
    assert all(oracle.same_bits(first, train(module, x)) for _ in range(3))


@pytest.mark.parametrize("cell", oracle.CELLS)
@each_strategy
def test_no_synchronisation(strategy: str, dtype: torch.dtype, cell: str) -> None:
    """Not in forward nor in backward, with lengths and resets that lie on the GPU."""
    module = net(cell, dtype, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, INPUT, device="cuda", dtype=dtype)
    lengths = torch.tensor([3, T, 0, 5, 1], device="cuda")
    reset = torch.rand(T, B, device="cuda") < 0.3
    right = train(module, x, lengths=lengths, reset=reset)  # the first call loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = train(module, x, lengths=lengths, reset=reset)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert oracle.same_bits(found, right)


@pytest.mark.parametrize("cell", oracle.CELLS)
@each_dtype
def test_graph_of_forward(strategy: str, cell: str, dtype: torch.dtype) -> None:
    module = net(cell, dtype, bidirectional=True)
    x = torch.randn(T, B, INPUT, device="cuda", dtype=dtype)
    lengths = torch.full((B,), T, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        warm_up(lambda: module(x, lengths=lengths))
        with torch.cuda.graph(graph):
            y, _ = module(x, lengths=lengths)
        for _ in range(3):  # both what x holds and how much of it counts may change
            x.normal_()
            lengths.random_(0, T + 1)
            graph.replay()
            assert oracle.same_bits(y, module(x, lengths=lengths)[0])


@pytest.mark.parametrize("cell", oracle.CELLS)
@each_strategy
def test_graph_of_a_training_step(strategy: str, dtype: torch.dtype, cell: str) -> None:
    module = net(cell, dtype, num_layers=2)
    plain = copy.deepcopy(module)
    x = torch.randn(T, B, INPUT, device="cuda", dtype=dtype)

    def step(one: nn.Module) -> None:
        one.zero_grad(set_to_none=False)
        one(x)[0].square().sum().backward()
        with torch.no_grad():
            for param in one.parameters():
                param -= 1e-3 * param.grad

    for one in (module, plain):
        for param in one.parameters():
            param.grad = torch.zeros_like(param)
    warm_up(lambda: step(module))
    plain.load_state_dict(module.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(module)
    for _ in range(3):
        x.normal_()
        graph.replay()
        step(plain)
        assert oracle.same_bits(list(module.parameters()), list(plain.parameters()))


def warm_up(work: Any) -> None:
    """Kernels are loaded at their first call, which cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("cell", oracle.CELLS)
@each_strategy
def test_the_current_stream(strategy: str, dtype: torch.dtype, cell: str) -> None:
    """All work goes to a side stream, and waits for nothing but what that one waits for."""
    module = net(cell, dtype, bidirectional=True)
    x = torch.randn(T, B, INPUT, device="cuda", dtype=dtype)
    right = train(module, x)
    late = torch.full_like(x, float("nan"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        train(module, x)  # its first memory and workspaces might have to wait
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        found = train(module, late)
        assert not stream.query(), "the call waited for the GPU"
    assert torch.cuda.current_stream().query(), "some of it went to another stream"
    torch.cuda.current_stream().wait_stream(stream)
    assert oracle.same_bits(found, right)


@pytest.mark.parametrize("cell", oracle.CELLS)
@each_strategy
def test_beside_other_work(strategy: str, dtype: torch.dtype, cell: str) -> None:
    """Two calls at a time on two streams, and products on a third that take what is left."""
    module = net(cell, dtype, bidirectional=True)
    x = [torch.randn(60, B, INPUT, device="cuda", dtype=dtype) for _ in range(2)]
    right = [train(module, one) for one in x]
    large = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(streams[2]):
            for _ in range(4):
                torch.mm(large, large)
        found = []
        for stream, one in zip(streams, x, strict=False):
            with torch.cuda.stream(stream):
                found.append(train(module, one))
        torch.cuda.synchronize()
        assert all(oracle.same_bits(f, r) for f, r in zip(found, right, strict=True))


@each_dtype
def test_many_launches(strategy: str, dtype: torch.dtype) -> None:
    """Some thousand, which start sooner or later after those before: every one is the first's."""
    module = net("LSTM", dtype)
    x = torch.randn(7, 9, INPUT, device="cuda", dtype=dtype)
    with torch.no_grad():
        right = module(x)[0]
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for launch in range(5000):
            if launch % 3 == 0:
                torch.cuda._sleep(launch * 7919 % 20_000)
            wrong += (module(x)[0] != right).any()
    assert wrong.item() == 0


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    module = net("LSTM")
    x = torch.randn(T, B, INPUT, device="cuda")
    right = train(module, x)
    assert oracle.same_bits(train(module.to("cuda:1"), x.to("cuda:1")), right)
    with pytest.raises(RuntimeError, match="not at the same device"):
        module(x)


@each_strategy
def test_lengths_out_of_range_stand_for_the_nearest(strategy: str, dtype: torch.dtype) -> None:
    module = net("GRU", dtype, bidirectional=True)
    x = torch.randn(T, B, INPUT, device="cuda", dtype=dtype)
    wild = torch.tensor([-3, T + 1, 2**40, 2, 0], device="cuda")
    right = train(module, x, lengths=wild.clamp(0, T))
    assert oracle.same_bits(train(module, x, lengths=wild), right)
    with pytest.raises(ValueError, match="lengths must lie in"):
        module(x, lengths=wild.cpu())


@pytest.mark.parametrize("mode", oracle.MODES)
def test_higher_derivatives(mode: str) -> None:
    call = cuda_cases.Call(mode, torch.float64, both=True, steps=2, batch=2, hidden_size=3)
    given = call.arguments("cuda", poison=False)
    leaves = [t.requires_grad_() for t in (given["x"], *given["params"])]

    def run(x: Tensor, *params: Tensor) -> Any:
        name = "rnn" if mode.startswith("RNN") else mode.lower()
        extra = {"nonlinearity": mode[4:].lower()} if name == "rnn" else {}
        function = getattr(fusedrnn.functional, name)
        return function(x, None, params, bidirectional=True, **extra)[0]

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("cell", oracle.CELLS)
@each_strategy
def test_compiled(strategy: str, dtype: torch.dtype, cell: str) -> None:
    module, x = net(cell, dtype), torch.randn(T, B, INPUT, device="cuda", dtype=dtype)
    right = train(module, x)
    found = train(torch.compile(module, fullgraph=True), x)
    assert oracle.same_bits(found[0], right[0])
    assert all(torch.allclose(f, r, rtol=1e-5) for f, r in zip(found, right, strict=True))


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_autocast(cell: str) -> None:
    module, x = net(cell), torch.randn(T, B, INPUT, device="cuda")
    theirs = getattr(nn, cell)(INPUT, HIDDEN, device="cuda")
    theirs.load_state_dict(module.state_dict())
    with torch.autocast("cuda", torch.bfloat16):
        y, other = module(x)[0], theirs(x)[0]
    assert y.dtype == other.dtype
    assert (y.double() - other.double()).abs().max() <= 2**-6  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("strategy", cuda_cases.DTYPES_OF, indirect=True)
def test_offsets_beyond_32_bits(strategy: str) -> None:
    """An output of more than 2^31 values ends as a call on its last steps alone does."""
    steps, batch, hidden_size = 2**15 + 3, 2**11, 32
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    module = fusedrnn.GRU(1, hidden_size, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(steps, batch, 1, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y, h_n = module(x)
        assert y.numel() > 2**31
        last, state = module(x[-5:], y[-6:-5].contiguous())
    # The GRU's own state is not rounded between steps, so the two are close and not the same.
    assert (last.float() - y[-5:].float()).abs().max() <= 2**-6
    assert (state.float() - h_n.float()).abs().max() <= 2**-6
