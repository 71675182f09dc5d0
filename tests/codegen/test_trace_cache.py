"""When a function is traced again, and what a trace keeps alive."""

from __future__ import annotations

import functools
import gc
import weakref

import torch

from tritonconv.codegen import Argument, Role, trace

X = (Argument("x", torch.float32, Role.VALUE),)
FACTOR = 2.0


def make(scale, tensor=None):
    return lambda x: x * scale if tensor is None else x * scale + tensor[0]


def test_equal_lambdas_share_a_trace():
    t = torch.ones(2)
    assert trace(make(2.0), X).program is trace(make(2.0), X).program
    assert trace(make(2.0, t), X) == trace(make(2.0, t), X)


def test_changed_cells_trace_again():
    t = torch.ones(2)
    programs = [
        trace(make(scale, tensor), X).program
        for scale, tensor in ((2.0, None), (3.0, None), (2, None), (2.0, t), (2.0, t.clone()))
    ]
    assert len(set(map(id, programs))) == len(programs)


def test_equal_programs_share_a_key_whatever_they_capture():
    a, b = trace(make(2.0, torch.ones(2)), X), trace(make(2.0, torch.zeros(2)), X)
    assert a.key == b.key
    assert a.captures[0] is not b.captures[0]
    assert a.jit is b.jit


def test_negative_zero_and_bool_are_not_mistaken():
    assert trace(make(0.0), X).program is not trace(make(-0.0), X).program
    assert trace(make(1), X).program is not trace(make(True), X).program


def test_changed_global_traces_again(monkeypatch):
    def f(x):
        return x * FACTOR

    assert trace(f, X)(torch.ones(1)) == 2
    monkeypatch.setitem(f.__globals__, "FACTOR", 5.0)
    assert trace(f, X)(torch.ones(1)) == 5


def test_defaults_partials_and_called_functions_count():
    def g(x, k=1.0):
        return x * k

    assert trace(functools.partial(g, k=2.0), X)(torch.ones(1)) == 2
    assert trace(functools.partial(g, k=3.0), X)(torch.ones(1)) == 3
    g.__defaults__ = (4.0,)
    assert trace(g, X)(torch.ones(1)) == 4
    assert trace(lambda x: g(x) + 1, X)(torch.ones(1)) == 5
    g.__defaults__ = (6.0,)
    assert trace(lambda x: g(x) + 1, X)(torch.ones(1)) == 7


def test_arguments_count():
    wide = (Argument("x", torch.float64, Role.VALUE),)
    assert trace(torch.tanh, X).outputs[0].dtype is torch.float32
    assert trace(torch.tanh, wide).outputs[0].dtype is torch.float64


def test_a_method_reads_its_object_and_parameters_keep_identity():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))

        def forward(self, x):
            return x * self.weight[1]

    one, two = Scale(), Scale()
    f = trace(one, X)
    assert f.captures == (one.weight,)
    assert f.captures[0] is one.weight
    assert trace(two.forward, X).captures[0] is two.weight
    f(torch.ones(1)).backward()
    assert one.weight.grad.tolist() == [0.0, 1.0]
    assert "weight = dm.load" in f.source


def test_captured_tensors_are_not_kept_alive():
    tensor = torch.ones(2)
    reference = weakref.ref(tensor)
    trace(make(2.0, tensor), X)
    del tensor
    gc.collect()
    assert reference() is None
