"""What is refused, by the name of the module or tensor and with the way out.

Together with `REFUSED` in test_clipper.py, which has what a clipper sees when it is made, these are more than thirty
constructions. Here are those that show in a forward, in a backward, or only in the comparison with the loop.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.self_check import check_gradients
from tests.gradients.cases import Layers, repeated_loss
from tests.tiny_families import RAW, DenoisingLoss, made_up_batch, tiny_model

B, D = 3, 4


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


class Around(nn.Module):
    """A trainable Linear `inner`, between two functions."""

    def __init__(self, before, after=lambda x: x, inner=None):
        super().__init__()
        self.before, self.after = before, after
        self.inner = inner or nn.Linear(D, D)
        self.eval()

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


class Transposed(nn.Module):
    """Reads its rows as sequences (length, b, d), as nn.LSTM and nn.MultiheadAttention do by default."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.eval()

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Prototypes(nn.Module):
    """Every example meets every row of a bank that happens to have as many rows as the batch."""

    def __init__(self):
        super().__init__()
        self.bank, self.inner = torch.randn(B, D), nn.Linear(D, D)
        self.eval()

    def forward(self, x):
        return x @ self.inner(self.bank).T


class Doubling(torch.autograd.Function):
    """Without setup_context, as in peft's LoHa, RandLora and C3A."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class RawScale(nn.Module):
    """A trainable parameter of no layer."""

    def __init__(self, function):
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(D)), function
        self.eval()

    def forward(self, x):
        return self.function(x * self.scale)


def squares(model, batch):
    return model(batch[0]).square().flatten(1).sum(dim=1)


def x_of(*shape):
    return (torch.randn(*shape),)


# Rows that are not where the clipper takes them to be, and losses of one example that depend on another.


def stratified_timesteps(model, batch):
    x, u = batch
    t = (torch.arange(len(x)) + u) / len(x)  # one stratum of [0, 1) for each place in the batch
    return model(x * t.unsqueeze(1)).square().sum(dim=1)


def draws_before_examples(model, batch):
    rows = torch.cat([batch[0], 2 * batch[0]])  # row j * b + i
    return model(rows).square().sum(dim=1).view(2, -1).mean(dim=0)


def weighted_by_the_batch_mean(model, batch):
    losses = squares(model, batch)
    return losses / losses.detach().mean()


def against_the_other_examples(model, batch):
    outputs = F.normalize(model(batch[0]))
    return squares(model, batch) + F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


def rolled(x):
    return x.roll(1, dims=0)


def minus_batch_mean(x):
    return x - x.mean(dim=0) / 2


def batch_norm(x):
    return F.batch_norm(x, None, None, training=True) if len(x) > 1 else x


def attention_over_the_batch(x):
    return F.scaled_dot_product_attention(x, x, x)


def dropout(x):
    return F.dropout(x, 0.5, training=True)


MIXED = {
    "stratified timesteps": (nn.Linear(D, D), stratified_timesteps, (torch.randn(B, D), torch.rand(B)), "weight"),
    "draws before examples": (nn.Linear(D, D), draws_before_examples, x_of(B, D), "weight"),
    "a weight of the batch's own losses": (nn.Linear(D, D), weighted_by_the_batch_mean, x_of(B, D), "weight"),
    "a contrastive loss": (nn.Linear(D, D), against_the_other_examples, x_of(B, D), "weight"),
    "rows time-major": (Transposed(), squares, x_of(B, 2 * B, D), "inner.weight"),
    "a bank of b rows": (Prototypes(), squares, x_of(B, D), "inner.weight"),
    "a neighbour's row": (Around(rolled), squares, x_of(B, D), "inner.weight"),
    "the batch's mean": (Around(minus_batch_mean), squares, x_of(B, D), "inner.weight"),
    "a functional batch norm": (Around(lambda x: x, batch_norm), squares, x_of(B, D), "inner.weight"),
    "attention over examples": (Around(attention_over_the_batch), squares, x_of(B, D), "inner.weight"),
    "a dropout that is always on": (Around(dropout), squares, x_of(B, D), "inner.weight"),
}


@pytest.mark.parametrize("model, loss_fn, batch, name", MIXED.values(), ids=MIXED)
def test_examples_that_meet_are_found_by_the_self_check(model, loss_fn, batch, name):
    clipper = PerSampleClipper(model.eval())
    with pytest.raises(UserError, match=rf"gradients of {name} differ.*mixes the examples.*Mend it"):
        check_gradients(clipper, loss_fn, batch)


def test_a_sound_model_passes_the_self_check_and_is_put_back():
    model = Around(torch.tanh)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_gradients(PerSampleClipper(model), squares, x_of(B, D))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_trainable_tensor_that_the_loss_does_not_feel_is_found_by_the_self_check():
    model = Around(lambda x: x, lambda y: y - y.detach())
    model.inner.bias.requires_grad_(False)
    with pytest.raises(UserError, match=r"inner\.weight .*Freeze it"):
        check_gradients(
            PerSampleClipper(model), lambda m, batch: squares(m, batch) + 0 * m(batch[0]).sum(1), x_of(B, D)
        )


@pytest.mark.parametrize("b", [0, 1])
def test_a_self_check_that_cannot_tell_examples_apart_is_refused(b):
    with pytest.raises(UserError, match="2 or more"):
        check_gradients(PerSampleClipper(nn.Linear(D, D).eval()), squares, x_of(b, D))


# Layers that the hooks meet in a way they cannot take apart.


def test_examples_folded_into_one_row_are_refused_by_name():
    model = Around(lambda x: x.flatten(0, 1).unsqueeze(0))  # (1, b * t, d): attention over all examples at once
    clipper = PerSampleClipper(model)
    with pytest.raises(UserError, match=r"layer inner .*\(1, 6, 4\) for 3 losses.*Expand"):
        clipper.clipped_sum_of(lambda m, batch: m(batch[0])[0].view(B, -1).sum(dim=1), x_of(B, 2, D))


def test_gradients_cut_off_by_reentrant_checkpointing_are_refused_by_name():
    model = Around(lambda x: x)

    def loss_fn(model, batch):  # no input of the checkpoint requires a gradient: the frozen base comes first
        hidden = checkpoint(model, batch[0], use_reentrant=True)
        return (hidden + torch.zeros(1, requires_grad=True)).square().sum(dim=1)

    with pytest.warns(UserWarning, match="requires_grad=True"), pytest.raises(UserError) as refused:
        PerSampleClipper(model).clipped_sum_of(loss_fn, x_of(B, D))
    assert "inner.weight" in str(refused.value) and "use_reentrant=False" in str(refused.value)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_float16_forward_is_refused_with_the_reason(kind):
    loss_fn = DenoisingLoss("DiT", autocast=torch.float16)
    with pytest.raises(UserError, match=r"float16.*scale.*private.*bfloat16"):
        PerSampleClipper(tiny_model("DiT", kind)).clipped_sum_of(loss_fn, made_up_batch(B, 2))


def test_adapter_weights_in_float16_are_refused_by_name():
    model = Layers(nn.Linear(D, D)).half()
    with pytest.raises(UserError, match=r"layers\.0 \(Linear\) trains weight in torch\.float16.*float32"):
        PerSampleClipper(model)


def test_a_sparse_embedding_is_refused_by_name():
    with pytest.raises(UserError, match=r"layers\.0 \(Embedding\) has .*sparse"):
        PerSampleClipper(Layers(nn.Embedding(D, D, sparse=True)))


def test_dropout_in_a_raw_adapter_is_refused_by_name():
    model = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["layers.0"], use_dora=True, lora_dropout=0.1), Layers(nn.Linear(D, D))
    )
    with pytest.raises(UserError, match=r"layers\.0 .*adapter dropout of 0\.1.*dropout 0"):
        PerSampleClipper(model.requires_grad_(True).eval())


# Raw parameters, which go by torch.func.


@pytest.mark.parametrize("kind", RAW)
def test_a_with_block_on_raw_parameters_is_refused_by_name_with_the_call_to_use(kind):
    with (
        pytest.raises(UserError, match=r"transformer_blocks\.0\.attn1\.to_q.*clipped_sum_of"),
        PerSampleClipper(tiny_model("DiT", kind)),
    ):
        pass


@pytest.mark.parametrize("kind", RAW)
def test_gradient_checkpointing_of_raw_parameters_is_refused_by_name(kind):
    model = tiny_model("DiT", kind)
    model.enable_gradient_checkpointing()
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.attn1\.to_q.*disable_gradient_checkpointing"):
        PerSampleClipper(model).clipped_sum_of(DenoisingLoss("DiT"), made_up_batch(B, 2))


def test_loha_is_refused_by_name_with_adapters_that_work():
    model = tiny_model("DiT", "loha")
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.attn1\.to_q.*torch\.func.*lora or lokr"):
        PerSampleClipper(model).clipped_sum_of(DenoisingLoss("DiT"), made_up_batch(B, 2))


NOT_FOLLOWED = {
    "an autograd function of its own": Doubling.apply,
    "a choice by value": lambda x: x if x.sum() > 0 else -x,
    "a number taken out": lambda x: x * float(x.detach().norm()),
    "a random draw": dropout,
    "a memory format": lambda x: x.view(1, 2, 1, 2).contiguous(memory_format=torch.channels_last).reshape(1, D),
}


@pytest.mark.parametrize("function", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_a_raw_parameter_that_torch_func_cannot_follow_is_refused_by_name(function):
    model = nn.Sequential(RawScale(function)).eval()
    with pytest.raises(UserError, match=r"trainable module 0 .*RawScale.*torch\.func cannot follow.*lora"):
        PerSampleClipper(model).clipped_sum_of(squares, x_of(B, D))


def test_bfloat16_autocast_that_torch_func_cannot_follow_is_refused_by_name():
    model = tiny_model("UNet2DConditionModel", "ia3")
    loss_fn = DenoisingLoss("UNet2DConditionModel", autocast=torch.bfloat16)
    with pytest.raises(UserError, match=r"to_q.*torch\.func cannot follow"):
        PerSampleClipper(model).clipped_sum_of(loss_fn, made_up_batch(B, 1))


@pytest.mark.parametrize("k", [1, 2])
def test_a_raw_loss_that_does_not_give_one_number_for_each_example_is_refused(k):
    model = Layers(RawScale(torch.tanh))
    with pytest.raises(UserError, match="one loss for each example|shape"):
        PerSampleClipper(model).clipped_sum_of(lambda m, batch: repeated_loss(k)(m, batch).sum(), x_of(B, D))
