"""Linear layers: rows on cache lines; projections that are parameters of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import sisa_model as sm
from sisa_kernels.testing import relative
from sisa_model.models.layers import SwiGLU
from sisa_model.models.linear import (
    FEW_WEIGHTS,
    MANY_ROWS,
    PADDED,
    Linear,
    PackedLinear,
    linear,
    padded_width,
)
from sisa_model.models.presets import PRESETS
from sisa_model.utils import buffers
from tests.support.models import tiny, tokens

SIZES = {"W_Q": 40, "W_K": 16, "w_gate": 7}


def test_few_rows_are_pytorchs_own_product():
    x, weight = torch.randn(MANY_ROWS - 1, 24, requires_grad=True), torch.randn(37, 24)
    y = linear(x, weight)
    assert torch.equal(y, F.linear(x, weight))
    assert y.stride(0) == 37


@pytest.mark.parametrize(
    ("rows", "d_in", "d_out"), [((3, 50), 24, 37), ((64,), 40, 48), ((2, 33), 16, 17)]
)
def test_linear_is_the_product_with_rows_on_cache_lines(rows, d_in, d_out):
    x, weight = (
        torch.randn(*rows, d_in, requires_grad=True),
        torch.randn(d_out, d_in, requires_grad=True),
    )
    dy = torch.randn(*rows, d_out)
    y = linear(x, weight)
    assert y.stride(-2) % 16 == 0
    expected = F.linear(x, weight)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy)
    )
    for needed, frozen in ((x, weight), (weight, x)):
        frozen.requires_grad_(False)
        y = linear(x, weight)
        frozen.requires_grad_(True)
        torch.testing.assert_close(
            torch.autograd.grad(y, needed, dy), torch.autograd.grad(F.linear(x, weight), needed, dy)
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


def packed(seed=0, d_in=24, sizes=SIZES):
    torch.manual_seed(seed)
    module = PackedLinear(d_in, sizes)
    module.reset_parameters(0.5)
    return module


@pytest.fixture
def products(monkeypatch):
    """The shapes of the weights that products are made with."""
    seen = []

    def counted(x, weight):
        seen.append(tuple(weight.shape))
        return linear(x, weight)

    monkeypatch.setattr("sisa_model.models.linear.linear", counted)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
def test_one_product_gives_what_each_projection_gives(products, autocast):
    module, x = packed(), torch.randn(2, 5, 24, requires_grad=True)
    results = []
    for call in (module, lambda x: [child(x) for child in module.children()]):
        module.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = call(x)
        sum(y.float().square().sum() for y in outputs).backward()
        results.append((outputs, x.grad, [p.grad for p in module.parameters()]))
    assert products == [(63, 24), (40, 24), (16, 24), (7, 24)]
    one, each = results
    assert one[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert {grad.dtype for grad in one[2]} == {torch.float32}
    tolerance = {"rtol": 5e-2, "atol": 0.1} if autocast else {}
    torch.testing.assert_close(one, each, **tolerance)


def test_few_rows_without_gradients_are_not_worth_a_copy(products):
    large = {"W_Q": FEW_WEIGHTS // 24, "W_K": 24}
    for sizes, rows, grad, calls in [
        (SIZES, 1, False, 1),
        (large, 1, False, 2),
        (large, 1, True, 1),
        (large, MANY_ROWS, False, 1),
    ]:
        module, x = packed(sizes=sizes), torch.randn(rows, 24)
        products.clear()
        with torch.set_grad_enabled(grad):
            found = module(x)
        assert len(products) == calls
        for y, child in zip(found, module.children()):
            torch.testing.assert_close(y, F.linear(x, child.weight))


class LowRank(nn.Module):
    """What PEFT's LoRA puts in a linear layer's place, by hand."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_projection_can_be_replaced():
    model, ids = tiny(), tokens()
    before = model(ids)
    proj = model.layers[0].attn.proj
    proj.W_Q = LowRank(proj.W_Q)
    nn.init.zeros_(proj.W_Q.up.weight)
    torch.testing.assert_close(model(ids), before)
    nn.init.normal_(proj.W_Q.up.weight)
    after = model(ids)
    assert (after - before).abs().max() > 1e-3
    after.logsumexp(-1).sum().backward()
    assert all(p.grad.any() for p in (proj.W_Q.up.weight, proj.W_Q.down.weight, proj.W_K.weight))
    assert proj.W_Q.base.weight.grad is None


def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    ids = tokens()
    before = tiny()(ids)
    config = peft.LoraConfig(target_modules=["W_Q", "w_up"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), config)
    after = model(ids)
    assert (after - before).abs().max() > 1e-3
    after.logsumexp(-1).sum().backward()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 2 * len(model.base_model.model.layers)
    assert all(p.grad.any() for p in adapters)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Quantised(torch.Tensor):
    """A tensor subclass, which a copy of its numbers would not do justice."""


def test_gradients_of_gradients_and_functorch_go_through_the_cast():
    module, x = packed(), torch.randn(4, 3, 24)

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            return sum(y.float().square().sum() for y in module(x))

    (dk,) = torch.autograd.grad(loss(x), module.W_K.weight, create_graph=True)
    dk.square().sum().backward()
    assert module.W_K.weight.grad.any()
    each = torch.stack([torch.func.grad(loss)(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), each, rtol=0.1, atol=0.5)


def hook(module):
    module.register_forward_hook(lambda module, args, y: 2 * y)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def own_forward(module):
    module.forward = lambda x, plain=module.forward: 2 * plain(x)


def parametrization(module):
    parametrize.register_parametrization(module, "weight", Doubled())


def bias(module):
    module.bias = nn.Parameter(torch.ones(module.out_features))


def global_hook(module):
    def double(called, args, y):
        return 2 * y if called is module else None

    return torch.nn.modules.module.register_module_forward_hook(double)


def subclass(module):
    module.__class__ = type(
        "Other", (Linear,), {"forward": lambda self, x: 2 * linear(x, self.weight)}
    )


@pytest.mark.parametrize(
    "change", [hook, pre_hook, own_forward, parametrization, bias, global_hook, subclass]
)
def test_what_is_done_to_a_projection_has_effect(change):
    module, x = packed(), torch.randn(3, 24)
    q, k, gate = module(x)
    handle = change(module.W_K)
    found = module(x)
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(found[0], q)
    torch.testing.assert_close(found[1], k + 1 if change is bias else 2 * k)
    torch.testing.assert_close(found[2], gate)


def test_backward_hooks_are_called():
    module, seen = packed(), []
    module.W_K.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    sum(y.sum() for y in module(torch.randn(3, 24, requires_grad=True))).backward()
    assert seen == [(3, 16)]


def test_other_kinds_of_weights_are_not_packed(products):
    module, x = packed(), torch.randn(3, 24)
    module.W_K.weight = nn.Parameter(module.W_K.weight.detach().as_subclass(Quantised))
    assert type(module.W_K.weight) is not nn.Parameter
    assert type(module(x)[1]) is Quantised
    assert len(products) == 3
    module = packed()
    module.W_K.double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        module(x)  # each by itself, and that one's dtype has no product with x


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "mamba2-tiny", "mamba3-tiny"])
def test_every_linear_is_called(preset):
    """Not its weight alone: what is put in its place, or hooked to it, has effect."""
    model, seen = sm.build(preset), []
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linears:
        module.register_forward_hook(lambda m, *_: seen.append(m))
    model(tokens())
    assert linears
    assert {id(module) for module in seen} == {id(module) for module in linears}


@pytest.mark.parametrize("preset", [name for name in PRESETS if "-tiny" in name])
def test_parameters_have_the_names_and_the_memory_of_what_is_saved(preset):
    model = tiny(preset)
    parameters, state = dict(model.named_parameters()), model.state_dict()
    assert list(parameters) == list(state)
    assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == len(parameters)
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in parameters.items())


def test_copies_and_casts_keep_their_own_weights():
    model, ids = tiny(), tokens()
    before = model(ids)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.layers[0].attn.proj.W_V.weight)
    assert torch.equal(model(ids), before)
    assert not torch.equal(other(ids), before)
    weight = other.bfloat16().layers[0].attn.proj.W_K.weight
    assert weight.dtype == torch.bfloat16
    assert other(ids).dtype == torch.bfloat16


def test_a_meta_model_takes_a_state_dict():
    plain = tiny()
    with torch.device("meta"):
        model = sm.build("sisa-tiny-ds16")
    model.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(model(tokens()), plain(tokens()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_values_are_one_draw_split_by_rows():
    module = packed(seed=3, d_in=5)  # whose matrices fill no 16 numbers that are drawn together
    torch.manual_seed(3)
    drawn = torch.empty(63, 5).normal_(std=0.5)
    assert torch.equal(torch.cat([*module.parameters()]), drawn)


@pytest.mark.parametrize("autocast", [False, True])
def test_swiglu_has_the_bits_of_its_formula_and_keeps_one_tensor_less(monkeypatch, autocast):
    monkeypatch.setattr(buffers, "TILE", 500)
    torch.manual_seed(0)
    ffn = SwiGLU(24, 37)
    ffn.w_in.reset_parameters(0.5)
    x = torch.randn(3, 11, 24, requires_grad=True)
    dy = torch.randn_like(x)
    weights = list(ffn.parameters())

    def plain(x):
        gate, up = ffn.w_in(x)
        return ffn.w_down(F.silu(gate) * up)

    found = []
    for function in (ffn, plain):
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.untyped_storage().data_ptr()), t)[1], lambda t: t
        )
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        gradients = torch.autograd.grad(y, [x, *weights], dy)
        found.append(([y, *gradients], len(set(kept))))
    (mine, few), (theirs, many) = found
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert few < many
    with torch.no_grad():
        assert autocast or torch.equal(ffn(x), mine[0])


def test_swiglu_calls_projections_that_were_replaced():
    ffn = SwiGLU(24, 32)
    ffn.w_in.reset_parameters(0.5)
    x = torch.randn(2, 24)
    doubled = ffn(x)
    ffn.w_in.w_up = nn.Sequential(ffn.w_in.w_up)
    torch.testing.assert_close(ffn(x), doubled)
    torch.nn.init.zeros_(ffn.w_in.w_up[0].weight)
    assert not ffn(x).any()


def test_swiglu_has_a_second_derivative():
    ffn = SwiGLU(6, 5).double()
    ffn.w_in.reset_parameters(0.5)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ffn, x)
    assert torch.autograd.gradgradcheck(ffn, x)
    each = torch.stack([torch.func.grad(lambda row: ffn(row).sum())(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda r: ffn(r).sum()))(x), each)


# ---- Widths that products like, as on a GPU in half precision ------------------------------------


@pytest.fixture
def widened(monkeypatch):
    """Padding as on a GPU in half precision, here and in any dtype."""
    monkeypatch.setattr("sisa_model.models.linear.alignment", lambda device, dtype: PADDED)


def test_only_a_gpu_in_half_precision_pads():
    cuda = torch.device("cuda")
    for width, found in [(2796, 2816), (2908, 2944), (50277, 50304), (2800, 2800), (1, 64)]:
        assert padded_width(width, cuda, torch.bfloat16) == found
        assert padded_width(width, cuda, torch.float16) == found
        assert padded_width(width, cuda, torch.float32) == width
        assert padded_width(width, torch.device("cpu"), torch.bfloat16) == width


@pytest.mark.parametrize("autocast", [False, True])
def test_padding_changes_no_result(widened, monkeypatch, autocast):
    """Of projections, of a SwiGLU and of one linear layer; gradients are contiguous."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 48, requires_grad=True)
    ffn = SwiGLU(48, 37)
    ffn.w_in.reset_parameters(0.5)
    proj = packed(d_in=48)
    single = Linear(48, 35)
    functions = [ffn, proj.side_by_side, lambda x: torch.cat(proj(x), -1), single]
    for function in functions:
        results = []
        leaves = [x, *ffn.parameters(), *proj.parameters(), *single.parameters()]
        for multiple in (PADDED, 1):
            monkeypatch.setattr("sisa_model.models.linear.alignment", lambda d, t, m=multiple: m)
            for leaf in leaves:
                leaf.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = function(x)
                with torch.no_grad():
                    torch.testing.assert_close(function(x), y)
            y.sum().backward()
            grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
            assert all(grad.is_contiguous() for grad in grads)
            results.append([y.detach(), *grads])
        bound = 2**-8 if autocast else 1e-6
        assert max(relative(a, b.double()) for a, b in zip(*results, strict=True)) < bound
        assert [a.shape for a in results[0]] == [b.shape for b in results[1]]


def test_rows_of_padded_products_are_aligned(widened):
    """v, beside the other operands, from tokens that begin at multiples of 16 elements."""
    attn = sm.build("sisa-tiny-ds16", n_layers=1).layers[0].attn
    assert sum(len(p.weight) for p in attn.proj.children()) % 16
    inputs = attn.operands(torch.randn(2, 65, attn.W_O.in_features))
    assert all(
        stride % 16 == 0 for x in (inputs.q, inputs.k, inputs.v) for stride in x.stride()[:3]
    )
    assert all(x.storage_offset() % 16 == 0 for x in (inputs.q, inputs.k, inputs.v))


@pytest.mark.parametrize("name", ["w_in.w_up", "w_down"])
@pytest.mark.parametrize("change", [hook, own_forward, subclass, bias])
def test_what_is_done_to_a_layer_has_effect_where_products_are_padded(widened, name, change):
    torch.manual_seed(0)
    ffn = SwiGLU(48, 37)
    ffn.w_in.reset_parameters(0.5)
    x = torch.randn(2, 40, 48)
    plain = copy.deepcopy(ffn)
    change(ffn.get_submodule(name))
    weights = (plain.w_in.w_gate.weight, plain.w_in.w_up.weight, plain.w_down.weight)
    gate, up = (F.linear(x, weight) for weight in weights[:2])
    added = float(change is bias)
    if name == "w_down":
        y = F.linear(F.silu(gate) * up, weights[2])
        expected = y + 1 if added else 2 * y
    else:
        expected = F.linear(F.silu(gate) * (up + 1 if added else 2 * up), weights[2])
    torch.testing.assert_close(ffn(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "mamba2-tiny", "mamba3-tiny"])
def test_a_model_with_padded_products_is_the_same(widened, monkeypatch, preset):
    ids = tokens()
    model = tiny(preset)
    names = list(model.state_dict())
    found = model(ids)
    found.logsumexp(-1).sum().backward()
    grads = [p.grad for p in model.parameters()]
    monkeypatch.undo()
    model.zero_grad()
    wanted = model(ids)
    wanted.logsumexp(-1).sum().backward()
    assert relative(found.detach(), wanted.detach().double()) < 1e-5
    for name, grad, p in zip(names, grads, model.parameters()):
        assert relative(grad, p.grad.double()) < 2e-5, name
        assert grad.shape == p.shape


def test_compiled_layers_pad_too(widened):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch.manual_seed(0)
    ffn = SwiGLU(48, 37)
    ffn.w_in.reset_parameters(0.5)
    x = torch.randn(2, 40, 48, requires_grad=True)
    widths = []

    def see(graph, inputs):
        products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        widths.extend(size for node in products for size in node.meta["val"].shape)
        return make_boxed_func(graph.forward)

    with torch.autocast("cpu", torch.bfloat16):
        backend = aot_autograd(fw_compiler=see, bw_compiler=see)
        compiled = torch.compile(ffn, backend=backend, fullgraph=True)
        found, wanted = compiled(x), ffn(x)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)
    found.sum().backward()
    assert len(widths) == 2 * 6
    assert not [width for width in widths if width % 16]
