"""Every equation: value against arithmetic by hand or by sampling, and the gradient of every term."""

import math
from dataclasses import replace

import pytest
import torch

from losses import Counts, count, group_advantages, kl_k3, masked_mean, papo_loss, policy_loss
from papo import PRESETS, preset

PLAIN = replace(preset("grpo"), kl_ref_coef=0.0)  # nothing but the policy gradient


def batch(B=6, T=9, seed=0, scale=0.3):
    """log_probs (leaf), old, ref, masked [B, T], advantages [B], mask [B, T] of unequal lengths."""
    g = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(B, T, generator=g) * 2 - 0.1
    old, ref, masked = (log_probs + scale * torch.randn(B, T, generator=g) for _ in range(3))
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0] = T
    mask = torch.arange(T)[None] < lengths[:, None]
    return log_probs.requires_grad_(), old, ref, masked, torch.randn(B, generator=g), mask


def loss_and_grad(algo, tensors, rows=slice(None), **more):
    log_probs, old, ref, masked, advantages, mask = tensors
    leaf = log_probs.detach().clone().requires_grad_()
    loss, metrics = papo_loss(
        leaf[rows], old[rows], advantages[rows], mask[rows], algo, ref[rows], masked[rows], **more
    )
    loss.backward()
    return loss.detach(), leaf.grad, metrics


# ------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    adv = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 1.0]), 3)
    std = math.sqrt(1 / 3)  # unbiased: variance of (1, 0, 0) is (4/9 + 1/9 + 1/9) / 2
    assert adv[:3].tolist() == pytest.approx(
        [2 / 3 / (std + 1e-6), -1 / 3 / (std + 1e-6), -1 / 3 / (std + 1e-6)]
    )
    assert adv[3:].sum().item() == pytest.approx(0, abs=1e-6)


def test_equal_rewards_have_no_advantage():
    """In fp32 the mean of five times 0.9 is not 0.9, and the residue over eps would be an advantage of 0.05."""
    assert group_advantages(torch.full((15,), 0.9), 5).abs().max() < 1e-8
    assert group_advantages(torch.tensor([0.3, 0.9]), 1).tolist() == [0.0, 0.0]


def test_rewards_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match=r"\(5,\).*groups of 3"):
        group_advantages(torch.zeros(5), 3)


# --------------------------------------------------------------------------------------------------- policy gradient


@pytest.mark.parametrize(
    "ratio, advantage, value, slope, clipped, dual",
    [  # slope: d loss / d log_prob; clip 0.2 / 0.3, dual clip 3
        (1.0, 1.0, -1.0, -1.0, 0, 0),
        (1.2, 1.0, -1.2, -1.2, 0, 0),
        (1.5, 1.0, -1.3, 0.0, 1, 0),
        (0.5, 1.0, -0.5, -0.5, 0, 0),
        (0.5, -1.0, 0.8, 0.0, 1, 0),
        (1.5, -1.0, 1.5, 1.5, 0, 0),
        (4.0, -1.0, 3.0, 0.0, 0, 1),
        (4.0, 1.0, -1.3, 0.0, 1, 0),
    ],
)
def test_policy_loss_one_token(ratio, advantage, value, slope, clipped, dual):
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, m = policy_loss(
        log_probs, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), 0.2, 0.3
    )
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6) and log_probs.grad.item() == pytest.approx(
        slope, rel=1e-6
    )
    assert (m["clip_frac"].item(), m["clip_frac_dual"].item()) == (clipped, dual)
    assert m["ppo_kl"].item() == pytest.approx(-math.log(ratio), rel=1e-6)


def test_averages_by_hand():
    """Row one has 1 token of ratio 1, row two has 3 of ratio 1.1: the two averages differ."""
    log_probs = torch.tensor([[0.0, 9.0, 9.0], [math.log(1.1)] * 3])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    args = (log_probs, torch.zeros(2, 3), torch.tensor([1.0, 2.0]), mask, 0.2, 0.3)
    assert policy_loss(*args, average="token")[0].item() == pytest.approx(
        -(1 + 3 * 2.2) / 4, rel=1e-6
    )
    assert policy_loss(*args, average="seq")[0].item() == pytest.approx(-(1 + 2.2) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="'token' or 'seq'"):
        policy_loss(*args, average="batch")


# ---------------------------------------------------------------------------------------------------------------- k3


def test_k3_is_an_unbiased_estimate_of_the_kl():
    """Averaged over samples from pi, k3 is KL(pi || ref) over the whole vocabulary; the paper's form is not."""
    g = torch.Generator().manual_seed(0)
    pi, ref = ((0.5 * torch.randn(50, generator=g)).log_softmax(-1) for _ in range(2))
    exact = (pi.exp() * (pi - ref)).sum().item()
    tokens = torch.multinomial(pi.exp(), 400_000, replacement=True, generator=g)
    k3 = kl_k3(pi[tokens], ref[tokens])
    error = k3.std().item() / math.sqrt(len(k3))
    assert abs(k3.mean().item() - exact) < 4 * error and error < 0.01 * exact
    literal = kl_k3(ref[tokens], pi[tokens])
    assert abs(literal.mean().item() - exact) > 10 * literal.std().item() / math.sqrt(len(k3))


def test_k3_by_hand_and_clamped():
    log_probs = torch.tensor([[-1.0, -1.0, -1.0, -30.0]], requires_grad=True)
    values = kl_k3(log_probs, torch.tensor([[-1.0, -2.0, 3.0, -1.0]]))
    assert values.tolist()[0] == pytest.approx([0.0, math.exp(-1) + 1 - 1, 10.0, 10.0])
    values.sum().backward()
    assert log_probs.grad.tolist()[0] == pytest.approx(
        [0.0, 1 - math.exp(-1), 0.0, 0.0]
    )  # 1 - exp(d), 0 where clamped


# --------------------------------------------------------------------------------------------------- the whole loss


def test_papo_loss_two_tokens_by_hand():
    """L = L_pg + beta KL_ref - gamma KL_prcp + eta1 H + eta2 H_mask at two tokens, each written out."""
    algo = replace(
        preset("papo_g"),
        kl_ref_coef=0.1,
        kl_prcp_coef=0.2,
        entropy_coef=0.3,
        masked_entropy_coef=0.4,
    )
    log_probs, old = torch.tensor([[-0.5, -1.0]]), torch.tensor([[-0.6, -1.0]])
    ref, masked = torch.tensor([[-0.7, -0.9]]), torch.tensor([[-1.5, -1.2]])
    loss, m = papo_loss(log_probs, old, torch.tensor([2.0]), torch.ones(1, 2), algo, ref, masked)
    k3 = lambda d: math.exp(d) - d - 1  # noqa: E731
    terms = {
        "pg_loss": -2.0 * (math.exp(0.1) + 1) / 2,
        "kl_ref": (k3(-0.2) + k3(0.1)) / 2,
        "kl_prcp": (k3(-1.0) + k3(-0.2)) / 2,
        "entropy": (0.5 + 1.0) / 2,
        "masked_entropy": (1.5 + 1.2) / 2,
    }
    for name, value in terms.items():
        assert m[name].item() == pytest.approx(value, rel=1e-5), name
    signs = {"pg_loss": 1, "kl_ref": 0.1, "kl_prcp": -0.2, "entropy": 0.3, "masked_entropy": 0.4}
    assert loss.item() == pytest.approx(sum(signs[n] * v for n, v in terms.items()), rel=1e-5)


def test_paper_estimator_and_clip():
    tensors = batch()
    _, _, mine = loss_and_grad(preset("papo_g"), tensors)
    _, grad, paper = loss_and_grad(replace(preset("papo_g"), kl_prcp_estimator="paper"), tensors)
    log_probs, _, _, masked, _, mask = tensors
    d = (log_probs - masked).detach()
    assert paper["kl_prcp"].item() == pytest.approx(
        masked_mean(d.exp() - d - 1, mask).item(), rel=1e-5
    )
    assert paper["kl_prcp"] != mine["kl_prcp"] and grad.norm() > 0
    _, _, cut = loss_and_grad(replace(preset("papo_g"), kl_prcp_clip=0.01), tensors)
    k3 = kl_k3(log_probs, masked).detach().clamp(0, 0.01)
    assert cut["kl_prcp"].item() == pytest.approx(masked_mean(k3, mask).item(), rel=1e-5)


TERMS = {"kl_ref_coef": "kl_ref", "kl_prcp_coef": "kl_prcp", "entropy_coef": "entropy"}


@pytest.mark.parametrize("coef", TERMS)
@pytest.mark.parametrize("average", ["token", "seq"])
def test_every_term_is_alive_alone(coef, average):
    """Advantage 0 and one term on: the loss is that term and the gradient is not 0."""
    log_probs, old, ref, masked, advantages, mask = batch()
    off = replace(preset("grpo"), kl_ref_coef=0.0, average=average)
    algo = replace(off, **{coef: 0.5})
    loss, grad, m = loss_and_grad(
        algo, (log_probs, old, ref, masked, torch.zeros_like(advantages), mask)
    )
    sign = -1 if coef == "kl_prcp_coef" else 1
    assert loss.item() == pytest.approx(sign * 0.5 * m[TERMS[coef]].item(), rel=1e-5)
    assert grad[mask].abs().sum() > 0 and grad[~mask].abs().sum() == 0


def test_masked_entropy_is_a_constant_unless_its_log_probs_carry_gradient():
    log_probs, old, _, masked, advantages, mask = batch()
    algo = replace(PLAIN, masked_entropy_coef=0.5)
    loss, grad, m = loss_and_grad(algo, (log_probs, old, masked, masked, advantages * 0, mask))
    assert (
        loss.item() == pytest.approx(0.5 * m["masked_entropy"].item())
        and loss > 0
        and grad.norm() == 0
    )
    live = masked.clone().requires_grad_()
    papo_loss(log_probs, old, advantages * 0, mask, algo, masked_log_probs=live)[0].backward()
    assert live.grad[mask].abs().sum() > 0 and live.grad[~mask].abs().sum() == 0


def test_kl_prcp_has_no_gradient_where_it_should_not():
    """Where the masked view changes nothing, and where k3 is clamped."""
    log_probs, old, _, _, advantages, mask = batch()
    algo = replace(PLAIN, kl_prcp_coef=1.0)
    same = log_probs.detach().clone()
    _, grad, m = loss_and_grad(algo, (log_probs, old, same, same, advantages * 0, mask))
    assert m["kl_prcp"] == 0 and grad.norm() == 0
    far = same + 5.0  # exp(5) - 6 > 10
    _, grad, m = loss_and_grad(algo, (log_probs, old, far, far, advantages * 0, mask))
    assert m["kl_prcp"].item() == pytest.approx(10.0) and grad.norm() == 0


def test_coefficient_zero_is_bit_equal_to_grpo():
    tensors = batch()
    log_probs, old, _, _, advantages, mask = tensors
    leaf = log_probs.detach().clone().requires_grad_()
    loss, _ = policy_loss(leaf, old, advantages, mask, 0.2, 0.3)
    loss.backward()
    measured, grad, metrics = loss_and_grad(PLAIN, tensors)
    assert torch.equal(measured, loss.detach()) and torch.equal(grad, leaf.grad)
    assert {
        "kl_ref",
        "kl_prcp",
        "masked_entropy",
        "entropy",
    } <= metrics.keys()  # measured, and adding nothing


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("average", ["token", "seq"])
def test_padding_changes_nothing(name, average):
    """Loss, metrics and gradients, whatever stands behind the end of a response: TRL's PAPO read it."""
    algo = replace(preset(name, "7b"), average=average)
    tensors = batch()
    mask = tensors[-1]
    clean = loss_and_grad(algo, tensors)
    for filler in (1e4, float("nan"), float("-inf")):
        dirty = [
            t.detach().masked_fill(~mask, filler) if t.shape == mask.shape else t
            for t in tensors[:-1]
        ]
        loss, grad, metrics = loss_and_grad(algo, (*dirty, mask))
        assert torch.equal(loss, clean[0]) and torch.equal(grad, clean[1])
        assert all(torch.equal(metrics[k], clean[2][k]) for k in metrics)


@pytest.mark.parametrize("average", ["token", "seq"])
def test_empty_rows_give_zero(average):
    log_probs, old, ref, masked, advantages, mask = batch()
    algo = replace(preset("papo_d"), average=average, kl_ref_coef=0.01)
    loss, grad, metrics = loss_and_grad(
        algo, (log_probs, old, ref, masked, advantages, torch.zeros_like(mask))
    )
    assert loss == 0 and grad.norm() == 0 and all(v == 0 for v in metrics.values())
    part = mask.clone()
    part[2:] = False
    loss, grad, _ = loss_and_grad(algo, (log_probs, old, ref, masked, advantages, part))
    assert torch.isfinite(loss) and torch.isfinite(grad).all() and grad[2:].abs().sum() == 0


@pytest.mark.parametrize("name", PRESETS)
def test_inputs_are_not_written_to(name):
    tensors = batch()
    before = [t.detach().clone() for t in tensors]
    loss_and_grad(preset(name, "7b"), tensors)
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("average", ["token", "seq"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_micro_batches_add_up(average, size):
    """Any split of unequal rows, some without an image, gives the loss, metrics and gradient of the whole."""
    algo = replace(preset("papo_g", "7b"), average=average)
    tensors = batch()
    has_image = torch.tensor([True, False, True, True, False, True])
    whole_loss, whole_grad, whole_metrics = loss_and_grad(algo, tensors, has_image=has_image)
    counts = count(tensors[-1], has_image)
    loss, grad, metrics = 0.0, 0.0, {}
    for start in range(0, 6, size):
        rows = slice(start, start + size)
        part, part_grad, m = loss_and_grad(
            algo, tensors, rows, denominator=counts, has_image=has_image[rows]
        )
        loss, grad = loss + part, grad + part_grad
        metrics = {k: metrics.get(k, 0.0) + v.item() for k, v in m.items()}
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(grad, whole_grad)
    assert metrics == pytest.approx({k: v.item() for k, v in whole_metrics.items()}, rel=1e-5)


def test_rows_without_an_image():
    """KL_prcp is 0 there in value and gradient, and they do not count in masked_entropy."""
    log_probs, old, ref, masked, advantages, mask = batch()
    has_image = torch.tensor([True, False, True, False, False, True])
    algo = replace(PLAIN, kl_prcp_coef=1.0, masked_entropy_coef=0.1)
    _, grad, m = loss_and_grad(
        algo, (log_probs, old, ref, masked, advantages * 0, mask), has_image=has_image
    )
    assert grad[~has_image].abs().sum() == 0 and grad[has_image].abs().sum() > 0
    seen = mask & has_image[:, None]
    assert m["masked_entropy"].item() == pytest.approx(-masked[seen].mean().item(), rel=1e-5)
    total = (
        kl_k3(log_probs, masked).detach()[seen].sum() / mask.sum()
    )  # the mean is over all tokens
    assert m["kl_prcp"].item() == pytest.approx(total.item(), rel=1e-5)
    none = torch.zeros(6, dtype=torch.bool)
    _, grad, m = loss_and_grad(
        algo, (log_probs, old, ref, masked, advantages * 0, mask), has_image=none
    )
    assert grad.norm() == 0 and m["masked_entropy"] == 0 and m["kl_prcp"] == 0


def test_missing_log_probs_are_an_error():
    log_probs, old, ref, masked, advantages, mask = batch()
    with pytest.raises(ValueError, match="kl_ref_coef=0.01 needs ref_log_probs"):
        papo_loss(log_probs, old, advantages, mask, preset("grpo"))
    with pytest.raises(ValueError, match="kl_prcp_coef=0.02.*masked_log_probs"):
        papo_loss(log_probs, old, advantages, mask, preset("papo_g"), ref)


def test_counts():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert count(mask) == Counts(3, 2, 3)
    assert count(mask, torch.tensor([False, True])) == Counts(3, 2, 1)
