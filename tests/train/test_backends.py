"""Back ends for CUDA: what a CPU can prove of them, and, where there is a GPU, that they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopcoder_oracle import SMALL, make, tokens
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from codeflow.errors import UsageError
from codeflow.train import backends, flex, varlen
from codeflow.train.attention import DENSE, SDPA, Attention, Documents
from codeflow.train.backends import BACKENDS, backend_named
from codeflow.train.model import LoopCoder

W = 64
EDGES = [1, W - 1, W, W + 1, 2 * W, 1, 3]
LAYOUTS = [EDGES, [700], [128, 128, 256], [127, 1, 300, 129], [1] * 130]
WINDOWS = [0, 1, W, 200, 384]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what lacks without one")


def qkv(
    lengths: list[int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(len(lengths))
    drawn = (torch.randn(sum(lengths), heads, 32, generator=g) for heads in (4, 2, 2))
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def seen_by_definition(lengths: list[int], window: int) -> Tensor:
    """(T, T) bool, from the indices of documents and nothing else."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i = torch.arange(len(document))
    distance = i[:, None] - i
    near = (distance >= 0) & (distance < (window or len(document)))
    return near & (document[:, None] == document)


def dense(q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int) -> Tensor:
    if window:
        return DENSE.local_attention(q, k, v, docs, window)
    return DENSE.global_attention(q, k, v, docs)


# -- flex -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LAYOUTS, ids=lambda n: f"{len(n)} documents")
@pytest.mark.parametrize("window", WINDOWS)
def test_what_a_query_sees_in_flex(lengths: list[int], window: int) -> None:
    docs, n = Documents.of(lengths), sum(lengths)
    index = torch.arange(n)
    mask_mod = flex.visible(docs.positions, window or n)
    seen = mask_mod(torch.zeros(()), torch.zeros(()), index[:, None], index)
    assert torch.equal(seen, seen_by_definition(lengths, window))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=8), st.sampled_from(WINDOWS))
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(
    lengths: list[int], window: int
) -> None:
    docs, n = Documents.of(lengths), sum(lengths)
    ours = flex.block_mask(docs, window)
    theirs = create_block_mask(ours.mask_mod, None, None, n, n, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    if n % flex.BLOCK == 0:  # torch counts no block that reaches over the end as full, we do
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


@pytest.mark.parametrize("lengths", LAYOUTS, ids=lambda n: f"{len(n)} documents")
@pytest.mark.parametrize("window", WINDOWS)
def test_full_blocks_are_full(lengths: list[int], window: int) -> None:
    """The kernel does not look at the mask inside them."""
    mask = flex.block_mask(Documents.of(lengths), window)
    seen = seen_by_definition(lengths, window)
    size = flex.BLOCK
    for row, (count, columns) in enumerate(
        zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    ):
        for column in columns[:count].tolist():
            block = seen[row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert block.all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, W])
def test_flex_forward_is_the_oracle(window: int) -> None:
    docs = Documents.of(EDGES)
    q, k, v = (x.detach() for x in qkv(EDGES))
    found = flex.attend(flex_attention, q, k, v, docs, window)
    torch.testing.assert_close(found, dense(q, k, v, docs, window), atol=1e-5, rtol=1e-4)


def test_blocks_are_found_once_per_batch_and_window() -> None:
    docs = Documents.of([5])
    masks = [flex._cached_mask(docs, w) for w in (0, W, 0, W)]
    assert masks[0] is masks[2]
    assert masks[1] is masks[3]
    assert masks[0] is not masks[1]


# -- varlen ---------------------------------------------------------------------------------------


def kernel_of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What `varlen_attn` of torch 2.11 promises, by the oracle; queries share no heads."""
    assert query.shape == key.shape == value.shape
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    lengths = [n for n in cu_seq_q.diff().tolist() if n]
    assert max_q == max_k == max(lengths)
    assert return_aux is scale is None
    left, right = window_size
    assert right == 0  # to the right of a token lies the future
    return dense(query, key, value, Documents.of(lengths), left + 1)


def kernel_of_2_12(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> Tensor:
    """The same with heads shared on request."""
    query, key, value, *rest = args
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return kernel_of_2_11(query, key, value, *rest, **kwargs)


@pytest.mark.parametrize("kernel", [kernel_of_2_11, kernel_of_2_12])
@pytest.mark.parametrize("window", [0, 1, W])
@pytest.mark.parametrize("lengths", LAYOUTS, ids=lambda n: f"{len(n)} documents")
def test_varlen_is_the_oracle(
    kernel: Callable[..., Tensor], window: int, lengths: list[int]
) -> None:
    docs = Documents.of(lengths)
    found = []
    for attend in (lambda *x: varlen.attend(kernel, *x), dense):
        q, k, v = qkv(lengths)
        out = attend(q, k, v, docs, window)
        torch.autograd.backward(out.square().sum())
        found.append((out, q.grad, k.grad, v.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 300))
def test_offsets_come_in_few_shapes(documents: int) -> None:
    docs = Documents.of([2] * documents)
    offsets = varlen._offsets(docs)
    assert len(offsets) % varlen.BUCKET == 0
    assert len(offsets) - len(docs.cu_seqlens) < varlen.BUCKET
    assert offsets[: documents + 1].tolist() == docs.cu_seqlens.tolist()
    assert (offsets[documents:] == 2 * documents).all()
    assert varlen._offsets(docs) is offsets


# -- names and choices ----------------------------------------------------------------------------


def test_an_unknown_back_end() -> None:
    with pytest.raises(UsageError, match="backend='flax' does not exist"):
        LoopCoder(SMALL, backend="flax")


@NO_GPU
@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_a_back_end_that_cannot_run_here(name: str) -> None:
    with pytest.raises(UsageError, match=f"backend='{name}' cannot run here: it needs a CUDA"):
        LoopCoder(SMALL, backend=name)


def test_a_torch_without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(varlen, "_kernel", lambda: None)
    with pytest.raises(UsageError, match=r"needs torch 2\.11"):
        backend_named("varlen")


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_tensors_on_the_wrong_device_are_refused(name: str) -> None:
    (q, k, v), docs = qkv([5]), Documents.of([5])
    with pytest.raises(UsageError, match=f"backend='{name}' needs .* on CUDA"):
        BACKENDS[name].global_attention(q, k, v, docs)
    with pytest.raises(UsageError, match=f"backend='{name}' needs .* on CUDA"):
        BACKENDS[name].local_attention(q, k, v, docs, 4)


@pytest.mark.parametrize(
    ("lengths", "half", "far", "near"),
    [
        ([backends.VARLEN_BELOW], True, "sdpa", "varlen"),
        ([backends.VARLEN_BELOW - 1], True, "varlen", "varlen"),
        ([2 * backends.VARLEN_BELOW, 10, 10], True, "varlen", "varlen"),
        ([10, 10], False, "sdpa", "sdpa"),
    ],
)
def test_the_choice_of_auto(
    lengths: list[int], half: bool, far: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []

    def named(name: str) -> Attention:
        def attend(q: Tensor, *_: Any) -> Tensor:
            chosen.append(name)
            return q

        return Attention(attend, attend)

    monkeypatch.setattr(backends, "SDPA", named("sdpa"))
    monkeypatch.setattr(varlen, "VARLEN", named("varlen"))
    monkeypatch.setattr(varlen, "takes", lambda _: half)
    x, docs = torch.zeros(sum(lengths), 1, 2), Documents.of(lengths)
    BACKENDS["auto"].global_attention(x, x, x, docs)
    BACKENDS["auto"].local_attention(x, x, x, docs, 4)
    assert chosen == [far, near]


def test_auto_is_sdpa_on_a_cpu() -> None:
    ids, docs = tokens(9), Documents.of([4, 5])
    a, b = (make(backend=name)(ids, docs).hidden for name in ("auto", "sdpa"))
    assert torch.equal(a, b)


# -- on CUDA --------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("name", ["auto", "sdpa", "varlen", "flex"])
@pytest.mark.parametrize("window", [0, W])
@pytest.mark.parametrize("lengths", [EDGES, [700], [300] * 3], ids=lambda n: f"{len(n)} documents")
def test_cuda_back_ends_are_the_oracle(name: str, window: int, lengths: list[int]) -> None:
    attention, docs = backend_named(name), Documents.of(lengths, "cuda")
    found = []
    for chosen in (attention, DENSE):
        q, k, v = qkv(lengths, "cuda", torch.bfloat16)
        if window:
            out = chosen.local_attention(q, k, v, docs, window)
        else:
            out = chosen.global_attention(q, k, v, docs)
        torch.autograd.backward(out.float().square().sum())
        found.append((out, q.grad, k.grad, v.grad))
    for one, other in zip(*found, strict=True):
        assert (one.float() - other.float()).norm() <= 2e-2 * other.float().norm()


@GPU
@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "sdpa", "varlen", "flex"])
@pytest.mark.parametrize("policy", ["none", "full", "save_attention"])
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_training_steps_agree(name: str, policy: str, compiled: bool) -> None:
    c = replace(SMALL, head_dim=16, hidden_size=64)
    ids = tokens(sum(EDGES)).cuda()
    gradients = []
    for backend in (name, "dense"):
        model = make(c, backend=backend, checkpointing=policy, dtype=torch.bfloat16).cuda()
        if compiled and backend == name:
            model.compile_layers()
        docs = Documents.of(EDGES, "cuda")
        torch.autograd.backward(model(ids, docs, ids.roll(-1)).loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 5e-2 * gradients[1].norm()


@GPU
def test_cuda_long_documents_need_no_square() -> None:
    lengths = [16384]
    q, k, v = qkv(lengths, "cuda", torch.bfloat16)
    docs = Documents.of(lengths, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    SDPA.global_attention(q, k, v, docs)
    assert torch.cuda.max_memory_allocated() - before < 16384 * 16384
