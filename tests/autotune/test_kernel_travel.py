"""A kernel and its call go to another process: found by place, tensors by value."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_kernels as kernels
import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonconv.autotune.decorator import Autotuner
from tritonconv.autotune.foreign import KernelProblem
from tritonconv.autotune.foreign_tuning import Tuning, using_lab
from tritonconv.autotune.kernel_call import capture
from tritonconv.autotune.kernel_config import is_lasting, text_of
from tritonconv.autotune.kernel_source import (
    KernelNotFoundError,
    load,
    place_of,
    source_hash,
)
from tritonconv.runtime.settings import settings

HERE = Path(__file__).parent


def problem_of(tuner: Autotuner, args: tuple[Any, ...], grid: Any = (4,)) -> KernelProblem:
    named = dict(zip(tuner.arg_names, args, strict=False))
    return Tuning(tuner).problem(args, {}, grid, tuner.configs, {"key.size": 100}, named)


def run_python(code: str, stdin: bytes = b"", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


# What the measuring process does with what it is sent.
CHILD = """
import pickle, sys, torch
from tritonconv.autotune.measure import NumericCheck
from tritonconv.autotune.space import Candidate
operator, problem = pickle.load(sys.stdin.buffer)
check = NumericCheck(operator, problem, torch.device("cpu"), 0)
(algorithm,) = operator.algorithms
for config in algorithm.configs(problem, None):
    verdict = check(Candidate(algorithm.name, config))
    print("ok" if verdict.ok else "wrong", end=" ")
"""

SCRIPT = '''
"""A script that does things, some of them without asking whether it is the main program."""
import sys
from dataclasses import replace
from pathlib import Path
import torch
import triton
import triton.language as tl
from tritonconv.autotune import autotune

print("side effect", file=sys.stderr)
x = torch.randn(1000)
configs = []
for block in (32, 64):
    configs.append(triton.Config({"BLOCK": block}))
FACTOR = tl.constexpr(2)

@triton.jit
def scale(x):
    return x * FACTOR

@autotune(configs=configs, key=["size"])
@triton.jit
def kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, scale(tl.load(x_ptr + offsets, mask=mask)), mask=mask)

Path("ran").touch()
if __name__ == "__main__":
    import pickle
    from tritonconv.autotune.foreign_tuning import Tuning
    tuning = Tuning(kernel)
    x = torch.randn(100)
    args = (x, torch.empty_like(x), 100)
    problem = tuning.problem(args, {}, (4,), configs, {}, dict(zip(kernel.arg_names, args)))
    sys.stdout.buffer.write(pickle.dumps((tuning.operator(True), problem)))
'''


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="both processes interpret kernels here")
class TestTravel:
    def test_a_script_is_not_run_again(self, tmp_path: Path) -> None:
        script = tmp_path / "train.py"
        script.write_text(SCRIPT)
        sent = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=tmp_path,
            timeout=300,
            check=True,
        ).stdout
        assert b"kernel.train.kernel" in sent
        (tmp_path / "ran").unlink()
        assert run_python(f"import os; os.chdir({str(tmp_path)!r})" + CHILD, sent) == "ok ok"
        assert not (tmp_path / "ran").exists()
        script.write_text(SCRIPT.replace("x * FACTOR", "x * 3"))
        with pytest.raises(AssertionError, match=r"KernelNotFoundError: kernel in \S+ has changed"):
            run_python(CHILD, sent)

    @pytest.mark.parametrize("name", ["double", "sloppy", "accumulate", "hooked"])
    def test_a_module_is_imported(self, name: str) -> None:
        tuner = getattr(kernels, name)
        x, y = torch.randn(100), torch.zeros(100)
        problem = problem_of(tuner, (x, y, 100, *([[]] if name == "hooked" else [])))
        sent = pickle.dumps((Tuning(tuner).operator(True), problem))
        expected = {"sloppy": "ok wrong wrong ok"}.get(name)
        assert run_python(CHILD, sent) == (expected or " ".join(["ok"] * len(tuner.configs)))
        assert torch.equal(y, torch.zeros(100))

    def test_measuring_process(self, tmp_path: Path) -> None:
        """The real one, with a laboratory that interprets: a candidate that dies costs itself."""
        isolated = pytest.importorskip("tritonconv.autotune.isolated")
        x, y = torch.randn(100), torch.zeros(100)
        kernels.sloppy.forget()
        lab = isolated.WorkerLab(lab="interpreting_lab:InterpretingLab")
        with (
            lab,
            using_lab(lab, isolated=True),
            pytest.warns(UserWarning, match="1 of 4 configs"),
        ):
            kernels.sloppy[(2,)](x, y, 100)
        assert torch.equal(y, 2 * x)
        assert kernels.sloppy.best_config.kwargs == {"BLOCK": 128, "OVERRUN": 0, "SCALE": 2}
        (entry,) = (
            json.loads(file.read_text())
            for file in (Path(settings.cache_dir) / "tuned").rglob("kernel.*/*.json")
        )
        assert [trial["status"] for trial in entry["trials"]] == ["ok", "numeric", "crash", "ok"]
        kernels.sloppy.forget()

    def test_a_package_with_relative_imports(self, tmp_path: Path) -> None:
        package = tmp_path / "mine"
        package.mkdir()
        (package / "__init__.py").write_text("")
        source = (HERE / "foreign_kernels.py").read_text()
        (package / "base.py").write_text(source)
        (package / "top.py").write_text("from .base import double\n")
        code = (
            "import sys, pickle, torch\n"
            f"sys.path.insert(0, {str(tmp_path)!r})\n"
            "from mine.top import double\n"
            "from tritonconv.autotune.foreign_tuning import Tuning\n"
            "place = Tuning(double).operator(True).place\n"
            "print(place.module, place.name)\n"
        )
        assert run_python(code) == "mine.base double"


class TestPlaces:
    def test_found_again(self) -> None:
        place = place_of(kernels.double, kernels.double.scope)
        assert (place.name, place.depth) == ("double", 0)
        assert load(place) is kernels.double
        above = kernels.heuristic_above.fn
        place = place_of(above, above.scope)
        assert (place.name, place.depth) == ("heuristic_above", 1)
        assert load(place) is above

    def test_not_found(self) -> None:
        local = kernels.make_local(2)
        with pytest.raises(KernelNotFoundError, match="not a global of its module"):
            place_of(local, local.scope)
        with pytest.raises(KernelNotFoundError, match="not a file"):
            place_of(local, {"__name__": "__main__"})

    def test_hashes(self) -> None:
        hashes = {
            source_hash(tuner)
            for tuner in (kernels.double, kernels.sloppy, kernels.heuristic_below.fn)
        }
        assert len(hashes) == 3
        assert source_hash(kernels.double) == source_hash(kernels.double.fn)
        assert source_hash(kernels.heuristic_below) != source_hash(kernels.heuristic_below.fn.fn)
        assert source_hash(kernels.make_local(2)) == source_hash(kernels.make_local(2))

    def test_texts(self) -> None:
        assert text_of(torch.float32) == "torch.float32"
        x = torch.randn(100)
        assert problem_of(kernels.double, (x, x, 100)).lasts()
        fleeting = triton.Config({"BLOCK": object()})
        assert not is_lasting(text_of(fleeting.kwargs["BLOCK"]))
        assert not replace(problem_of(kernels.double, (x, x, 100)), configs=(fleeting,)).lasts()


class TestCalls:
    def rebuilt(self, *args: Any) -> tuple[Any, ...]:
        call = pickle.loads(pickle.dumps(capture([f"p{i}" for i in range(len(args))], args, {})))
        return call.fill(call.tensors(torch.device("cpu")))[0]

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.randn(3, 5),
            lambda: torch.randn(5, 3).t(),
            lambda: torch.randn(40)[3:20:2],
            lambda: torch.randn(4, 1).expand(4, 7),
            lambda: torch.arange(7).to(torch.bfloat16),
            lambda: torch.randn(8, 8)[2:5, 1:4],
            lambda: torch.tensor(3),
            lambda: torch.empty(0, 4),
            lambda: torch.tensor([True, False]),
        ],
    )
    def test_tensors(self, make: Any) -> None:
        tensor = make()
        (again,) = self.rebuilt(tensor)
        assert torch.equal(again, tensor)
        assert again.dtype is tensor.dtype
        assert again.stride() == tensor.stride()
        if tensor.numel():
            assert again.data_ptr() % 64 == tensor.data_ptr() % 64
        assert again.data_ptr() != tensor.data_ptr() or not tensor.numel()

    def test_shared_memory_stays_shared(self) -> None:
        x = torch.zeros(10)
        left, right, other = self.rebuilt(x[:6], x[4:], torch.zeros(10))
        left += 1
        assert right.tolist() == [1, 1, 0, 0, 0, 0]
        assert not other.any()

    def test_nested_and_other_arguments(self) -> None:
        x = torch.randn(4, 16, dtype=torch.float16)
        descriptor = TensorDescriptor.from_tensor(x, [2, 16])
        pair, described, rest = self.rebuilt((x, 3), descriptor, None)
        assert torch.equal(pair[0], x)
        assert pair[1] == 3
        assert torch.equal(described.base, x)
        assert described.block_shape == [2, 16]
        assert described.base.data_ptr() == pair[0].data_ptr()
        assert rest is None


class TestPlans:
    """A launch that is nothing but a launch can be compiled ahead of time."""

    @pytest.mark.parametrize(
        ("name", "planned"),
        [("double", True), ("accumulate", True), ("increment", False), ("heuristic_below", False)],
    )
    def test_which(self, name: str, planned: bool) -> None:
        tuner = getattr(kernels, name)
        x = torch.randn(100)
        problem = problem_of(tuner, (x, 100) if name == "increment" else (x, x.clone(), 100))
        (algorithm,) = Tuning(tuner).operator(False).algorithms
        plan = algorithm.plan(problem, algorithm.listed(problem)[0])
        assert (plan is not None) is planned
        if plan is not None:
            assert plan.zeroed == tuple(tuner.reset_to_zero)
            (call,) = plan.calls
            assert call.constexprs == {"BLOCK": 32}
            assert call.grid == (4, 1, 1)

    @pytest.mark.aot
    def test_compiles(self) -> None:
        code = (
            "import torch, triton\n"
            "import foreign_kernels as kernels\n"
            "from test_kernel_travel import problem_of\n"
            "from tritonconv.autotune.foreign_tuning import Tuning\n"
            "from tritonconv.runtime.aot import compile_plan\n"
            "x = torch.randn(100)\n"
            "problem = problem_of(kernels.double, (x, x.clone(), 100))\n"
            "(algorithm,) = Tuning(kernels.double).operator(True).algorithms\n"
            "for config in algorithm.listed(problem):\n"
            "    (compiled,) = compile_plan(algorithm.plan(problem, config), 'sm_90')\n"
            "    print(compiled.name, compiled.spill_bytes)\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**environment, "PYTHONPATH": str(HERE)},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["double", "0"] * 3


def test_the_parent_grid_function_is_asked_once_per_config() -> None:
    def grid(meta: Any) -> tuple[int]:
        if meta["BLOCK"] == 64:
            raise KeyError("BLOCK_M")
        return (triton.cdiv(meta["size"], meta["BLOCK"]),)

    x = torch.randn(100)
    problem = problem_of(kernels.double, (x, x, 100), grid)
    assert problem.grids == ((4, 1, 1), "KeyError: 'BLOCK_M'", (1, 1, 1))
