"""When a function is traced again, and what a trace keeps alive."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import weakref

import torch

from tritonconv.codegen import Argument, Role, trace
from tritonconv.codegen.fingerprint import Fingerprint

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


def layer(cfg, fn):
    return lambda x: fn(cfg, x)


def at_one(fn):
    return trace(fn, X)(torch.ones(1)).item()


def test_an_object_met_before_the_function_that_names_its_attribute():
    class Box:
        pass

    box = Box()
    box.gain = 2.0
    calls = [
        layer(box, lambda c, x: x * c.gain),
        functools.partial(lambda c, fn, x: fn(c, x), box, lambda c, x: x * c.gain),
    ]

    def with_defaults(x, cfg=box, fn=lambda c, x: x * c.gain):
        return fn(cfg, x)

    calls.append(with_defaults)
    for gain in (2.0, 4.0, 2.0):
        box.gain = gain
        assert [at_one(fn) for fn in calls] == [gain] * 3


def test_names_that_are_found_round_by_round():
    class Box:
        pass

    inner, outer = Box(), Box()
    inner.gain = 2.0
    outer.inner = inner
    outer.read = lambda o: o.inner.gain
    fn = layer(outer, lambda o, x: x * o.read(o))
    for gain in (2.0, 4.0):
        inner.gain = gain
        assert at_one(fn) == gain


def test_attributes_of_classes_slots_and_functions_count():
    class Module(torch.nn.Module):
        gain = 1.0

        def forward(self, x):
            return x * self.gain

    class Derived(Module):
        pass

    class Helped(Module):
        def forward(self, x):
            return self.help(x)

        def help(self, x):
            return x * self.twice / 2

        @property
        def twice(self):
            return 2 * self.gain

    @dataclasses.dataclass(slots=True)
    class Slots:
        gain: float = 1.0

    class Static:
        gain = 1.0

        @staticmethod
        def apply(x):
            return x * Inherits.gain

    class Inherits(Static):
        pass

    def own(x):
        return x * own.gain

    slots = Slots()
    calls = [
        Module(),
        Derived(),
        Derived().forward,
        Helped(),
        lambda x: x * slots.gain,
        lambda x: x * Inherits.gain,
        lambda x: Inherits.apply(x),
        own,
    ]
    for gain in (1.0, 5.0, 1.0):
        Module.gain = slots.gain = Static.gain = own.gain = gain
        assert [at_one(fn) for fn in calls] == [gain] * len(calls)


def test_a_replaced_method_of_a_class_counts():
    class Module(torch.nn.Module):
        def forward(self, x):
            return self.act(x)

        act = torch.exp

    module = Module()
    assert at_one(module) == torch.ones(1).exp().item()
    Module.act = torch.neg
    assert at_one(module) == -1


def test_an_empty_slot_is_no_error():
    class Slots:
        __slots__ = ("gain", "other")

    slots = Slots()
    slots.gain = 3.0
    assert at_one(lambda x: x * slots.gain if hasattr(slots, "other") else x + slots.gain) == 4.0


def test_shape_and_dtype_of_a_captured_tensor_count():
    t = torch.arange(4.0)
    fn = make(1.0, t)
    assert trace(fn, X).program.captures[0].shape == (4,)
    t.resize_(2)
    assert trace(fn, X).program.captures[0].shape == (2,)
    t.data = torch.arange(4)
    assert trace(fn, X).program.captures[0].dtype is torch.int64


def test_plain_functions_are_walked_once(monkeypatch):
    walks = []
    of = Fingerprint.of

    def counted(self, x):
        walks.append(x)
        return of(self, x)

    monkeypatch.setattr(Fingerprint, "of", counted)
    fn = make(2.0, torch.ones(2))
    Fingerprint().key_of(fn)
    assert walks.count(fn) == 1


def test_a_graph_of_shared_objects_is_walked_once() -> None:
    """Objects that all name each other: as a tree they would be walked for years."""

    class Node:
        def __init__(self) -> None:
            self.links: tuple[Node, ...] = ()

        def first(self, y: torch.Tensor) -> torch.Tensor:
            return y * len(self.links)

    nodes = [Node() for _ in range(40)]
    for node in nodes:
        node.links = tuple(nodes)
    begin = time.perf_counter()
    for _ in range(3):
        f = trace(lambda x: nodes[0].first(x), X)
    assert time.perf_counter() - begin < 20
    assert f(torch.tensor(2.0)) == 80
