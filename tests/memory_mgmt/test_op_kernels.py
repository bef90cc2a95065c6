"""Kernels that oneDNN writes and keeps, against the C library's own count of what is in use."""

import ctypes
import subprocess
import sys

import pytest
import torch

from memory_mgmt.devices import DEVICES, MIB
from memory_mgmt.op_kernels import onednn_kernels
from memory_mgmt.overheads import ONEDNN_KERNEL, ONEDNN_KERNELS, ONEDNN_LIBRARY, fixed_terms
from tests.trainer.test_step_trace import config, request
from trainer.step_trace import trace_request

FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
KERNEL_IN_USE = 0.52 * MIB

needs_onednn = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2") or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="needs glibc's mallinfo2 and a CPU on which torch gives bf16 products to oneDNN",
)

IN_USE = """
import ctypes, torch
from memory_mgmt.op_kernels import onednn_kernels
NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
def in_use():
    return libc.mallinfo2().uordblks
torch.set_num_threads(1)
"""

PRODUCTS = """
def bf16(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)
x, w, b = bf16(512, 128), bf16(384, 128), bf16(8, 64, 32)
q = bf16(1, 4, 1024, 32)
calls = [("mm", x, w.t()), ("mm", bf16(512, 384), w), ("mm", x, bf16(128, 384)), ("mm", bf16(384, 512), x), ("mm", x[:256], w.t()),
         ("bmm", b, b.transpose(1, 2)), ("bmm", b, bf16(8, 32, 64)), ("addmm", bf16(384), x, w.t()),
         ("_scaled_dot_product_flash_attention_for_cpu", q, q, q)]
ops = {name: getattr(torch.ops.aten, name) for name, *_ in calls}
torch.mm(x[:64], w[:64].t())  # loads the library
for again in range(2):
    kernels, before = {}, in_use()
    for name, *args in calls:
        ops[name](*args)
        kernels.update([onednn_kernels(f"aten::{name}", args)])
    print(sum(kernels.values()), in_use() - before)
"""

STEPS = """
import json, sys
from memory_mgmt.allocator_log import record_cpu_allocations
from trainer.build import build_engine
from trainer.config import RunConfig
from trainer.step_trace import _batch
cfg = RunConfig.model_validate(json.loads(sys.argv[1]))
with record_cpu_allocations() as log:
    engine, batches = build_engine(cfg, 320, None, torch.device("cpu")), [_batch(cfg, cfg.data.seq_len)]
    before, start = in_use(), log.mark()
    for _ in range(2):
        engine.forward_backward(batches)
        engine.step(1e-3)
    tensors = sum(b.size for b in log.blocks(start) if b.freed is None and b.size < 2**17)
    print(in_use() - before - tensors)
"""


def run(code, *args):
    """What ``code`` prints in a process of its own: kernels are kept from test to test otherwise."""
    command = [sys.executable, "-c", IN_USE + code, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]


@needs_onednn
def test_every_new_product_leaves_one_kernel_and_a_known_one_none():
    (kernels, first), (_, again) = run(PRODUCTS)
    assert kernels == 8 + 2
    assert first == pytest.approx(kernels * KERNEL_IN_USE, rel=0.15)
    assert again < KERNEL_IN_USE / 2


@needs_onednn
def test_the_trace_counts_the_kernels_of_a_real_step():
    cfg = config(model={"layers": ["full", "memory"]}, train={"precision": "bf16", "threads_per_rank": 1})
    counted = trace_request(request(cfg)).notes["onednn_kernels"]
    ((left,),) = run(STEPS, cfg.model_dump_json())
    assert counted > 20
    assert left == pytest.approx(counted * KERNEL_IN_USE, rel=0.25)


def test_wide_products_and_other_operations_have_none():
    x = torch.ones(4, 4)
    assert onednn_kernels("aten::mm", (x, x))[1] == 0
    assert onednn_kernels("aten::add", (x.bfloat16(), x.bfloat16()))[1] == 0
    q = torch.ones(1, 1, 4, 4)
    assert onednn_kernels(FORWARD, (q, q, q))[1] == 0


def test_float32_steps_count_none():
    wide = trace_request(request(config()))
    assert wide.notes["onednn_kernels"] == 0
    assert "oneDNN kernels" not in [term.name for term in fixed_terms(DEVICES["cpu"], 1, 0)]


def test_equal_layers_share_their_kernels():
    low = {"precision": "bf16"}
    two, ten = (config(model={"layers": ["full"], "n_layers": n}, data={"seq_len": 256}, train=low) for n in (2, 10))
    whole, extended = trace_request(request(two)), trace_request(request(ten, whole=False))
    assert extended.notes["traced_layers"] < 10
    assert extended.notes["onednn_kernels"] == whole.notes["onednn_kernels"] > 0


@pytest.mark.parametrize(("kernels", "kept"), [(40, 40), (5000, ONEDNN_KERNELS)])
def test_the_plan_has_a_term_for_as_many_as_onednn_keeps(kernels, kept):
    terms = {term.name: term for term in fixed_terms(DEVICES["cpu"], 1, kernels)}
    assert terms["oneDNN kernels"].bytes == ONEDNN_LIBRARY + kept * ONEDNN_KERNEL
    assert KERNEL_IN_USE <= ONEDNN_KERNEL
