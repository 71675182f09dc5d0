"""The decorator for users' own kernels on a real GPU: ``pytest -m gpu``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import foreign_gpu_kernels as kernels
import pytest
import torch
import triton

from tritonconv.autotune import foreign_tuning
from tritonconv.autotune.decorator import Autotuner
from tritonconv.runtime.settings import settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    for value in vars(kernels).values():
        if isinstance(value, Autotuner):
            value.forget()
    foreign_tuning._warned.clear()


def add(x: torch.Tensor, y: torch.Tensor, tuner: Any = kernels.add) -> torch.Tensor:
    out = torch.empty_like(x)
    tuner[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, out, x.numel())
    return out


def matmul(a: torch.Tensor, b: torch.Tensor, tuner: Any = kernels.matmul) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)

    def grid(meta: Any) -> tuple[int, int]:
        return triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(n, meta["BLOCK_N"])

    tuner[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride())
    return c


def entries() -> list[dict[str, Any]]:
    files = sorted((Path(settings.cache_dir) / "tuned").rglob("kernel.*/*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_add_like_triton() -> None:
    x, y = torch.randn(2, 1 << 22, device="cuda")
    theirs = triton.autotune(kernels.ADD_CONFIGS, key=["size"])(kernels.add_kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # measured in a process of its own, and nothing wrong
        assert torch.equal(add(x, y), add(x, y, theirs))
    (entry,) = entries()
    assert {trial["status"] for trial in entry["trials"]} <= {"ok", "timed"}
    assert len(kernels.add.configs_timings) == len(kernels.ADD_CONFIGS)
    # Ours may be another of those that are equally fast, never one that is much slower.
    times = theirs.configs_timings
    assert times[kernels.add.best_config][0] < 1.3 * times[theirs.best_config][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matmul_like_triton(dtype: torch.dtype) -> None:
    a = torch.randn(1000, 520, device="cuda", dtype=dtype)
    b = torch.randn(768, 520, device="cuda", dtype=dtype).t()
    theirs = triton.autotune(kernels.MATMUL_CONFIGS, key=["M", "N", "K"])(kernels.matmul_kernel)
    ours, other = matmul(a, b), matmul(a, b, theirs)
    torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-2)
    (entry,) = entries()
    by_status = {trial["status"]: trial for trial in entry["trials"]}
    assert by_status.keys() <= {"ok", "timed", "constraint", "launch"}, by_status
    assert entry["trials"][-1]["status"] in ("constraint", "launch")
    assert sum(trial["status"] == "ok" for trial in entry["trials"]) >= 3


def test_softmax_with_heuristics() -> None:
    x = torch.randn(1823, 781, device="cuda")
    y = torch.empty_like(x)
    kernels.softmax[(x.shape[0],)](x, y, x.stride(0), x.shape[1])
    torch.testing.assert_close(y, torch.softmax(x, 1))
    assert len(entries()) == 1


def test_configs_that_kill_and_hang_cost_nothing_else() -> None:
    x = torch.randn(100_000, device="cuda")
    y, flag = torch.empty_like(x), torch.zeros(1, dtype=torch.int32, device="cuda")
    kernels.wild[lambda meta: (triton.cdiv(meta["size"], meta["BLOCK"]),)](x, y, flag, x.numel())
    torch.cuda.synchronize()
    assert torch.equal(y, 2 * x)
    (entry,) = entries()
    statuses = [trial["status"] for trial in entry["trials"]]
    assert statuses[0] == "ok"
    assert statuses[1] == "crash"
    assert statuses[2] == "run_timeout"
    assert statuses[3] == "ok"


PROGRAM = """
import torch, foreign_gpu_kernels as kernels
from tritonconv.autotune import isolated, measure
from test_decorator_gpu import add
def refuse(*args, **kwargs):
    raise AssertionError("measured")
measure.CudaTimer = isolated.WorkerTimer = refuse
x = torch.randn(1 << 22, device="cuda")
assert torch.equal(add(x, x), x + x)
print(kernels.add.best_config)
"""


def test_a_second_process_measures_nothing() -> None:
    x = torch.randn(1 << 22, device="cuda")
    add(x, x)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITONCONV_CACHE_DIR": str(settings.cache_dir),
            "PYTHONPATH": str(Path(__file__).parent),
        },
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(kernels.add.best_config)


def test_never_inside_a_graph() -> None:
    x, y = torch.randn(2, 1 << 20, device="cuda")
    with settings.override(autotune="off"):
        add(x, y)  # compiled
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="CUDA graph"), torch.cuda.graph(graph):
        out = add(x, y)
    assert not entries()
    graph.replay()
    assert torch.equal(out, x + y)
    add(x, y)
    assert len(entries()) == 1


def test_under_torch_compile() -> None:
    x, y = torch.randn(2, 1 << 16, device="cuda")
    compiled = torch.compile(lambda x, y: add(x, y) * 2, fullgraph=True)
    assert torch.equal(compiled(x, y), (x + y) * 2)


def test_in_this_process() -> None:
    tuner = Autotuner(
        kernels.add_kernel,
        kernels.add_kernel.arg_names,
        kernels.ADD_CONFIGS,
        ["size"],
        None,
        None,
        scope={},
        isolated=False,
    )
    x, y = torch.randn(2, 1 << 22, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(add(x, y, tuner), x + y)
    assert len(entries()) == 1


def test_the_host_time_of_a_known_key() -> None:
    import timeit

    x, y = torch.randn(2, 256, device="cuda")
    out = torch.empty_like(x)
    add(x, y)
    config = kernels.add.best_config
    bare = kernels.add_kernel[(1,)]
    tuned = kernels.add[(1,)]
    options = config.all_kwargs()

    def microseconds(call: Any) -> float:
        torch.cuda.synchronize()
        return 1e3 * min(timeit.repeat(call, number=1000, repeat=20))

    over = microseconds(lambda: tuned(x, y, out, 256)) - microseconds(
        lambda: bare(x, y, out, 256, **options)
    )
    print(f"{over:.2f} us over the bare launch")
    assert over < 2.0  # 0.5 on an idle host
