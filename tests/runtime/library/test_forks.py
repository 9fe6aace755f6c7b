"""A process that has computed on several threads forks: its children compute too, and none waits for ever."""

import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parents[2] / "helpers"

CODE = """
import multiprocessing, os, sys, threading
import torch
import oracles_ops as oracle
from dbrx_quant.runtime.kernels import ops
from dbrx_quant.runtime.library import _native

torch.manual_seed(0)
torch.set_num_threads(3)
tensors = oracle.random_tensors([(4, 256)], 512)
x, states = torch.randn(64, 256), torch.randn(4, 8, 256, 64)

def kernels():
    return ops.linear(x, tensors)

def torch_itself():
    assert torch.get_num_threads() == 1
    return torch.nn.functional.scaled_dot_product_attention(states, states, states)

def child(what, body):
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(30)
    if process.is_alive():
        process.kill()
        sys.exit(f"{what}: the child hangs")
    if process.exitcode:
        sys.exit(f"{what}: the child ended with {process.exitcode}")

expected = kernels()
torch.nn.functional.scaled_dot_product_attention(states, states, states)

def same():
    assert torch.equal(kernels(), expected)

child("kernels", same)
child("torch's own products", torch_itself)
child("a grandchild", lambda: (same(), child("in the child", same)))
assert torch.get_num_threads() == 3

_native.set_threads(3)
child("as many threads again", same)

stop = threading.Event()

def work():
    while not stop.is_set():
        kernels()

worker = threading.Thread(target=work)
worker.start()
try:
    for _ in range(10):
        child("another thread in a call", same)
finally:
    stop.set()
    worker.join()

pid = os.fork()
same()
if pid:
    assert os.waitpid(pid, 0)[1] == 0, "ordinary exit"
"""


def test_kernels_and_torch_work_in_forked_children():
    run = [sys.executable, "-c", CODE]
    done = subprocess.run(run, env={"PYTHONPATH": str(HELPERS)}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
