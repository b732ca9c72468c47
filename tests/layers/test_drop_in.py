"""A layer in the place of attention: torch's encoders, checkpointing, autocast; and the examples."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from seqconv import S4D, ButterflyConv, Hyena, LongConv
from seqconv.nn import AsAttention

D, BATCH, LENGTH = 8, 3, 30
LAYERS = {
    "s4d": lambda **options: S4D(D, **options),
    "long_conv": lambda **options: LongConv(D, l_max=40, kernel_dropout=0.0, **options),
}
GRAD = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def block_of(layer, *, batch_first=True, norm_first=False, dropout=0.0):
    options = {"batch_first": batch_first, "norm_first": norm_first, "dropout": dropout}
    block = nn.TransformerEncoderLayer(D, nhead=2, dim_feedforward=16, **options)
    block.self_attn = AsAttention(layer, batch_first=batch_first)
    return block


def stack_of(block, depth=2, *, nested=True):
    """As torch builds it, then with weights of its own in every layer."""
    with warnings.catch_warnings():
        if block.norm_first or not block.self_attn.batch_first:  # torch warns of these itself
            warnings.simplefilter("ignore")
        stack = nn.TransformerEncoder(block, depth, enable_nested_tensor=nested)
    for copy in stack.layers:
        for parameter in copy.parameters():
            nn.init.normal_(parameter, std=0.3)
    return stack


def by_hand(block, x, padding):
    """The encoder layer written out; x (batch, length, d_model)."""

    def feed_forward(x):
        return block.linear2(F.relu(block.linear1(x)))

    mix = block.self_attn.layer
    if block.norm_first:
        x = x + mix(block.norm1(x), padding)
        return x + feed_forward(block.norm2(x))
    x = block.norm1(x + mix(x, padding))
    return block.norm2(x + feed_forward(x))


def padded(side="right"):
    x, padding = torch.randn(BATCH, LENGTH, D), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 20:] = padding[1, 5:] = True
    return x, padding.flip(1) if side == "left" else padding


@pytest.mark.parametrize("norm_first", [False, True], ids=["postnorm", "prenorm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["blh", "lbh"])
@pytest.mark.parametrize("grad", GRAD)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_encoders_are_the_model_written_by_hand(make, norm_first, batch_first, grad, train):
    layer = make(bidirectional=True)
    block = block_of(layer, batch_first=batch_first, norm_first=norm_first)
    x, padding = padded()
    given = x if batch_first else x.transpose(0, 1)

    def check(model, blocks, mask):
        wanted = x
        for each in blocks:
            wanted = by_hand(each, wanted, None if mask is None else padding)
        with GRAD[grad]():
            y = model.train(train)(given, src_key_padding_mask=mask)
        y = y if batch_first else y.transpose(0, 1)
        assert wanted.std() > 0.1
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)

    masks = (None, padding, torch.zeros(BATCH, LENGTH).masked_fill(padding, -torch.inf))
    for mask in masks:
        check(block, [block], mask)
    for nested in (True, False):
        stack = stack_of(block, nested=nested)
        for mask in masks:
            check(stack, stack.layers, mask)


def test_a_stack_built_before_the_layers_are_put_in(make):
    """It may have chosen nested tensors then, and must not use them."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=True), 2)
    for block in stack.layers:
        block.self_attn = AsAttention(make(bidirectional=True), batch_first=True)
    x, padding = padded()
    with torch.no_grad():
        y = stack.eval()(x, src_key_padding_mask=padding)
        wanted = by_hand(stack.layers[1], by_hand(stack.layers[0], x, padding), padding)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_torch_would_take_its_fused_kernel_here():
    """What the tests above guard against is real: torch's own attention goes that way."""
    called = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    x, padding = padded()
    block = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval()
    with torch.no_grad(), Spy():
        block(x, src_key_padding_mask=padding)
    assert any("transformer_encoder_layer_fwd" in name for name in called)
    called.clear()
    with torch.no_grad(), Spy():
        block_of(S4D(D)).eval()(x, src_key_padding_mask=padding)
    assert called and not any("transformer_encoder_layer_fwd" in name for name in called)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_padding_is_invisible(make, side, train):
    block = block_of(make(bidirectional=True))
    stack = stack_of(block).train(train)
    x, padding = padded(side)
    noisy = torch.where(padding.unsqueeze(-1), torch.tensor(torch.nan), x)
    other = torch.where(padding.unsqueeze(-1), torch.tensor(7.0), x)
    with nullcontext() if train else torch.no_grad():
        wanted = stack(x, src_key_padding_mask=padding)[~padding]
        assert torch.equal(stack(noisy, src_key_padding_mask=padding)[~padding], wanted)
        assert torch.equal(stack(other, src_key_padding_mask=padding)[~padding], wanted)
        assert not torch.allclose(stack(other)[~padding], wanted, atol=1e-3)
    # The gradient of what is not padding does not reach padding either.
    x.requires_grad_()
    stack(x, src_key_padding_mask=padding)[~padding].square().sum().backward()
    assert torch.isfinite(x.grad).all() and not x.grad[padding].any() and x.grad[~padding].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_causal_masks(make, dtype, train):
    stack = stack_of(block_of(make())).train(train)
    x = torch.randn(BATCH, LENGTH, D)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    causal = causal if dtype.is_floating_point else causal != 0
    with nullcontext() if train else torch.no_grad():
        wanted = stack(x)
        assert torch.equal(stack(x, causal), wanted)
        assert torch.equal(stack(x, causal, is_causal=True), wanted)
        x[:, 20:] += 1
        torch.testing.assert_close(stack(x, causal)[:, :20], wanted[:, :20], rtol=1e-4, atol=1e-4)
    attention = AsAttention(make(), batch_first=True)
    y, weights = attention(x, x, x, is_causal=True)
    assert weights is None and torch.equal(y, attention.layer(x))
    for wrong in (causal.T, torch.zeros_like(causal), causal.roll(1, 0)):
        with pytest.raises(ValueError, match="attn_mask must hide exactly the future"):
            attention(x, x, x, attn_mask=wrong)
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match="attn_mask must hide exactly the future"):
            attention(x, x, x, attn_mask=causal - 1)  # a bias that attention would not ignore
    hyena = AsAttention(Hyena(D, l_max=LENGTH), batch_first=True)
    assert torch.equal(hyena(x, x, x, attn_mask=causal)[0], hyena.layer(x))
    learned = AsAttention(
        ButterflyConv(D, l_max=LENGTH), batch_first=True
    )  # causal until its transforms are learned
    for both in (AsAttention(make(bidirectional=True), batch_first=True), learned):
        both(x, x, x, attn_mask=torch.zeros_like(causal))
        with pytest.raises(ValueError, match="attn_mask must hide nothing"):
            both(x, x, x, attn_mask=causal)
        with pytest.raises(ValueError, match="is_causal must be False for a layer that sees"):
            both(x, x, x, is_causal=True)


def test_decoder_layer(make):
    """Its self-attention is the layer, its cross-attention stays what it is."""
    block = nn.TransformerDecoderLayer(D, 2, 16, dropout=0.0, batch_first=True)
    layer = make()
    block.self_attn = AsAttention(layer, batch_first=True)
    x, memory = torch.randn(BATCH, LENGTH, D), torch.randn(BATCH, 7, D)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    y = block(x, memory, tgt_mask=causal, tgt_is_causal=True)
    h = block.norm1(x + layer(x))
    h = block.norm2(h + block.multihead_attn(h, memory, memory)[0])
    wanted = block.norm3(h + block.linear2(F.relu(block.linear1(h))))
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", GRAD)
def test_a_single_sequence(make, batch_first, grad):
    block = block_of(make(bidirectional=True), batch_first=batch_first).eval()
    x, padding = padded()
    with GRAD[grad]():
        y = block(x[0], src_key_padding_mask=padding[0])
    torch.testing.assert_close(y, by_hand(block, x, padding)[0], rtol=1e-5, atol=1e-5)


def test_contract(make):
    attention = AsAttention(make(), batch_first=False)
    x = torch.randn(LENGTH, BATCH, D)
    assert set(attention.state_dict()) == {f"layer.{n}" for n in attention.layer.state_dict()}
    with pytest.raises(ValueError, match="query, key and value must be the same tensor"):
        attention(x, x, x.clone())
    with pytest.raises(
        ValueError, match=r"query must be \(length, batch, d_model=8\) or \(length,"
    ):
        attention(*[x[..., :5]] * 3)
    with pytest.raises(ValueError, match=r"mask must be \(batch=3, length=30\), got \(30, 3\)"):
        attention(x, x, x, key_padding_mask=torch.zeros(LENGTH, BATCH, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask must be \(length=30, length=30\)"):
        attention(x, x, x, attn_mask=torch.zeros(6, LENGTH, LENGTH))
    with pytest.raises(TypeError, match=r"layer must be a layer with d_model .* got Linear"):
        AsAttention(nn.Linear(D, D), batch_first=True)
    with pytest.raises(ValueError, match="batch_first must be True or False"):
        AsAttention(make(), batch_first=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_into_one_graph(make, causal):
    torch._dynamo.reset()
    stack = stack_of(block_of(make(bidirectional=not causal))).eval()
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    x, padding = padded()
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    with torch.no_grad():
        options = {"mask": mask, "is_causal": causal, "src_key_padding_mask": padding.float()}
        options["src_key_padding_mask"] = torch.zeros(padding.shape).masked_fill(
            padding, -torch.inf
        )
        torch.testing.assert_close(compiled(x, **options), stack(x, **options))


# ---- memory and precision ----


def test_gradient_checkpointing_changes_nothing(make):
    """Dropout included: the recomputation sees the same masks."""
    blocks = nn.ModuleList(block_of(make(bidirectional=True, dropout=0.1)) for _ in range(2))
    x, padding = padded()

    def gradients(run):
        blocks.zero_grad()
        torch.manual_seed(1)
        y = x
        for block in blocks:
            y = run(block, y)
        y[~padding].square().mean().backward()
        return [p.grad for p in blocks.parameters()]

    plain = gradients(lambda block, y: block(y, src_key_padding_mask=padding))
    saved = gradients(
        lambda block, y: checkpoint(block, y, src_key_padding_mask=padding, use_reentrant=False)
    )
    assert all(g.abs().max() > 0 for g in plain)
    for one, other in zip(saved, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_autocast_training_lowers_the_loss(make, checkpointed):
    block = block_of(make())
    head = nn.Linear(D, 1)
    x = torch.randn(8, LENGTH, D)
    target = x[..., :1].cumsum(1) / 5
    optimizer = torch.optim.Adam([*block.parameters(), *head.parameters()], 1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            loss = F.mse_loss(head(y).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # torch asks for autocast too
        assert torch.isfinite(block.eval()(x)).all()
