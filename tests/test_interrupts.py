"""Ctrl-C during a long kernel."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from mudsc_fast import _core

# Interrupts itself three times, each a little later in a call. What passes until the exception is told in seconds of
# this process's CPU, of which one thread gets as many as pass on a clock unless other programs keep the machine busy.
PROGRAM = """
import os, signal, sys, threading, time, torch, mudsc_fast as mf
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
kind = sys.argv[1]
if kind == "zip":
    s = torch.rand(6000, 6000, generator=g); s += s.T.clone()
    call = lambda: mf.zip_units(s)
elif kind == "blocks":
    torch.set_num_threads(2)  # a third block for one of them, while the other waits
    s = torch.rand(9000, 9000, generator=g); s += s.T.clone()
    pairing = torch.arange(3).expand(2, 3)
    call = lambda: mf.zip_units(s[:8400, :8400], blocks=3, block_indices=pairing)
elif kind == "assign":
    i = torch.arange(1, 6001, dtype=torch.float32)
    s = i[:, None] * i[None, :] + torch.rand(6000, 6000, generator=g)
    call = lambda: mf.assign(s)
elif kind == "uniform":
    s = torch.rand(6000, 6000, generator=g)
    call = lambda: mf.assign(s)
elif kind == "shared batch":
    torch.set_num_threads(2)  # a long problem on one of them, while the other has none left
    i = torch.arange(1, 4001, dtype=torch.float32)
    hard = i[:, None] * i[None, :] + torch.rand(4000, 4000, generator=g)
    s = torch.stack([torch.eye(4000), hard, torch.eye(4000)])
    call = lambda: mf.assign(s)
elif kind == "batch":
    s = torch.rand(40000, 24, 24, generator=g)
    call = lambda: mf.assign(s)
elif kind == "merge":
    s = torch.rand(12000, 6000, generator=g)  # one tensor, both axes in another order: gathered entry by entry
    axes = [mf.Space(name, n, (mf.Axis("w", dim, "in"),)) for dim, (name, n) in enumerate((("a", 12000), ("b", 6000)))]
    moved = {x.name: torch.randperm(x.width, generator=g) for x in axes}
    labels = {name: torch.stack([torch.arange(len(p)), p]) for name, p in moved.items()}
    plan = mf.MergePlan(mf.PermutationSpec(axes), labels, "align")
    call = lambda: plan.merge([{"w": s}, {"w": s}])["w"]
    rows, columns = moved["a"][:50], moved["b"]
    whole = lambda: torch.equal(call()[rows][:, columns], (s[rows][:, columns] + s[:50]) / 2)
else:
    pair = [torch.randn(6000, 40, generator=g) for _ in range(2)]
    s = pair[0]
    tiles = mf.SimilarityTiles([pair], None, 1.0)
    call = lambda: mf.assign_tiled(tiles)
before = s.clone()
whole = locals().get("whole", lambda: True)
sent = [0.0]
def interrupt():
    sent[0] = time.process_time()
    os.kill(os.getpid(), signal.SIGINT)
waits = []
for delay in (0.02, 0.3, 0.7):
    timer = threading.Timer(delay, interrupt)
    timer.start()
    try:
        for _ in range(10000):
            call()
    except KeyboardInterrupt:
        waits.append(time.process_time() - sent[0])
print(len(waits), max(waits), torch.equal(s, before) and whole())
"""


@pytest.mark.parametrize("kind", ["zip", "blocks", "assign", "uniform", "batch", "shared batch", "tiled", "merge"])
def test_ctrl_c_ends_a_long_kernel(kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, kind]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    interrupted, longest, unchanged = ran.stdout.split()
    assert interrupted == "3"
    assert unchanged == "True"
    assert float(longest) < 0.2


def test_ctrl_c_beside_a_union_that_falls_short() -> None:
    # The first union has no allowed pair and is done at once; the signal comes while the second is still merged.
    n = 3000
    s = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    s += s.T.clone()
    model_of = torch.tensor([0, 1], dtype=torch.int32)[:, None].repeat(1, n)
    units, owner = torch.arange(n).repeat(2, 1), torch.empty(2, n, dtype=torch.int64)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted, done = 0, False
    try:
        for delay in range(1, 40):
            budget = torch.tensor([0, n])
            signal.setitimer(signal.ITIMER_REAL, delay * 0.02)
            try:
                assert _core.zip_unions(s, units, model_of, n - 10, 0.999, budget, n, owner, 2) == [(0.0, 0)]
                done = True
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            if done:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 0
