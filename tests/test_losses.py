"""losses.py: the value of every equation, and the gradient of every term."""

import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from losses import group_advantages, kl_k3, papo_loss, policy_loss, response_mean
from papo import preset

POLICY_GRADIENT = replace(preset("grpo"), kl_ref_coef=0.0)  # no other term


class Batch(NamedTuple):
    log_probs: torch.Tensor  # [B, T], as are old, ref, masked and mask
    old: torch.Tensor
    ref: torch.Tensor
    masked: torch.Tensor
    advantages: torch.Tensor  # [B]
    mask: torch.Tensor

    def without_advantages(self):
        """The batch with advantages of 0: no policy gradient."""
        return self._replace(advantages=torch.zeros_like(self.advantages))


def random_batch(n_rows=6, length=9, scale=0.3):
    """Random log-probs of responses of unequal lengths."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return scale * torch.randn(n_rows, length, generator=generator)

    log_probs = -torch.rand(n_rows, length, generator=generator) * 2 - 0.1
    old, ref, masked = (log_probs + noise() for _ in range(3))
    lengths = torch.randint(1, length + 1, (n_rows,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length)[None] < lengths[:, None]
    advantages = torch.randn(n_rows, generator=generator)
    return Batch(log_probs, old, ref, masked, advantages, mask)


def loss_and_grad(algo, batch, rows=slice(None), **more):
    """papo_loss of some rows, its gradient by all log-probs, and its metrics."""
    leaf = batch.log_probs.clone().requires_grad_()
    loss, metrics = papo_loss(
        leaf[rows],
        batch.old[rows],
        batch.advantages[rows],
        batch.mask[rows],
        algo,
        ref_log_probs=batch.ref[rows],
        masked_log_probs=batch.masked[rows],
        **more,
    )
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def test_advantages_by_hand():
    """Groups of three, of two and of one, whose responses lie in any order."""
    rewards = torch.tensor([1.0, 5.0, 0.0, 7.0, 0.0, 1.0])
    advantages = group_advantages(rewards, torch.tensor([40, 8, 40, -3, 40, 8]))
    std = math.sqrt(1 / 3)  # unbiased: the variance of (1, 0, 0) is (4/9 + 1/9 + 1/9) / 2
    low, high = -1 / 3 / (std + 1e-6), 2 / 3 / (std + 1e-6)
    assert advantages[[0, 2, 4]].tolist() == pytest.approx([high, low, low])
    assert advantages[[1, 5]].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert advantages[3] == 0
    with pytest.raises(ValueError, match=r"\(5,\) and \(3,\)"):
        group_advantages(torch.zeros(5), torch.zeros(3))


def test_equal_rewards_have_no_advantage():
    """In fp32 the mean of six 0.9s is not 0.9; divided by eps, the residue would be 0.06."""
    index = torch.arange(3).repeat_interleave(6)
    assert group_advantages(torch.full((18,), 0.9), index).abs().max() < 1e-8


@pytest.mark.parametrize(
    "ratio, advantage, value, slope, clipped, dual_clipped",
    [  # slope: d loss / d log_prob, with clip 0.2 / 0.3 and dual clip 3
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
def test_policy_loss_of_one_token(ratio, advantage, value, slope, clipped, dual_clipped):
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    old, mask = torch.zeros(1, 1), torch.ones(1, 1)
    loss, metrics = policy_loss(log_probs, old, torch.tensor([advantage]), mask, 0.2, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert log_probs.grad.item() == pytest.approx(slope, rel=1e-6)
    assert metrics["clip_frac"].item() == clipped
    assert metrics["clip_frac_dual"].item() == dual_clipped
    assert metrics["ppo_kl"].item() == pytest.approx(-math.log(ratio), rel=1e-6)


def test_an_infinite_dual_clip_is_none():
    """And no NaN where the advantage is 0."""
    log_probs, mask = torch.full((2, 1), math.log(20.0)), torch.ones(2, 1)
    args = log_probs, torch.zeros(2, 1), torch.tensor([-1.0, 0.0]), mask, 0.2, 0.2
    assert policy_loss(*args, clip_dual=math.inf)[0].item() == pytest.approx(20 / 2)


def test_k3_by_hand_and_clamped():
    log_probs = torch.tensor([[-1.0, -1.0, -1.0, -30.0]], requires_grad=True)
    values = kl_k3(log_probs, torch.tensor([[-1.0, -2.0, 3.0, -1.0]]))
    assert values.tolist()[0] == pytest.approx([0.0, math.exp(-1) + 1 - 1, 10.0, 10.0])
    values.sum().backward()
    expected = [0.0, 1 - math.exp(-1), 0.0, 0.0]  # 1 - exp(d), and 0 where k3 is clamped
    assert log_probs.grad.tolist()[0] == pytest.approx(expected)


# Of two tokens of one response, and one of another.
SHARES = {"token": [1 / 3, 1 / 3, 1 / 3], "seq": [1 / 4, 1 / 4, 1 / 2]}


@pytest.mark.parametrize("average", SHARES)
def test_papo_loss_by_hand(average):
    """L = L_pg + beta KL_ref - gamma KL_prcp + eta1 H + eta2 H_mask, each term written out.

    The entropies are means over tokens always.
    """
    algo = replace(
        preset("papo_g"),
        kl_ref_coef=0.1,
        kl_prcp_coef=0.2,
        entropy_coef=0.3,
        masked_entropy_coef=0.4,
        average=average,
    )
    mask = torch.tensor([[True, True], [True, False]])
    tokens = [  # advantage, then log-probs: new, old, ref, masked
        (2.0, -0.5, -0.6, -0.7, -1.5),
        (2.0, -1.0, -1.0, -0.9, -1.2),
        (-1.0, -0.4, -0.3, -0.6, -0.2),
    ]
    _, *columns = zip(*tokens, strict=True)
    new, old, ref, masked = (
        torch.zeros(2, 2).masked_scatter(mask, torch.tensor(column)) for column in columns
    )
    new.requires_grad_()
    loss, metrics = papo_loss(new, old, torch.tensor([2.0, -1.0]), mask, algo, ref, masked)
    loss.backward()

    expected, gradient = Counter(), []
    of_tokens = zip(SHARES[average], tokens, strict=True)
    for share, (a, log_prob, old_one, ref_one, masked_one) in of_tokens:
        ratio = math.exp(log_prob - old_one)
        d_ref, d_masked = ref_one - log_prob, masked_one - log_prob
        expected["pg_loss"] += -a * ratio * share
        expected["kl_ref"] += (math.exp(d_ref) - d_ref - 1) * share
        expected["kl_prcp"] += (math.exp(d_masked) - d_masked - 1) * share
        expected["entropy"] += -log_prob / 3
        expected["masked_entropy"] += -masked_one / 3
        of_kls = 0.1 * (1 - math.exp(d_ref)) - 0.2 * (1 - math.exp(d_masked))
        gradient.append((-a * ratio + of_kls) * share - 0.3 / 3)
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    weights = {"pg_loss": 1, "kl_ref": 0.1, "kl_prcp": -0.2, "entropy": 0.3, "masked_entropy": 0.4}
    total = sum(weight * expected[name] for name, weight in weights.items())
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert new.grad[mask].tolist() == pytest.approx(gradient, rel=1e-4)


def test_kl_prcp_as_the_paper_writes_it():
    batch = random_batch()
    _, _, metrics = loss_and_grad(replace(preset("papo_g"), kl_prcp_estimator="paper"), batch)
    d = batch.log_probs - batch.masked
    expected = response_mean(d.exp() - d - 1, batch.mask)
    assert metrics["kl_prcp"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("average", SHARES)
def test_padding_changes_nothing(average):
    """Whatever follows the end of a response leaves loss, metrics and gradients as they are.

    The inputs are not written to either.
    """
    algo = replace(preset("papo_g", "7b"), average=average)
    batch = random_batch()
    batch = batch._replace(advantages=batch.advantages[:, None] * torch.rand(batch.mask.shape))
    clean_loss, clean_grad, clean_metrics = loss_and_grad(algo, batch)
    for filler in (1e4, float("nan"), float("-inf")):
        fields = ("log_probs", "old", "ref", "masked", "advantages")
        filled = {field: getattr(batch, field).masked_fill(~batch.mask, filler) for field in fields}
        loss, grad, metrics = loss_and_grad(algo, batch._replace(**filled))
        assert torch.equal(loss, clean_loss)
        assert torch.equal(grad, clean_grad)
        assert all(torch.equal(metrics[k], clean_metrics[k]) for k in metrics)
    untouched = random_batch()._replace(advantages=batch.advantages)
    assert all(torch.equal(a, b) for a, b in zip(batch, untouched, strict=True))


@pytest.mark.parametrize("average", SHARES)
def test_empty_responses_give_zero(average):
    """Not NaN: all of them, and some of them."""
    batch = random_batch()
    algo = replace(preset("papo_d"), average=average, kl_ref_coef=0.01)
    loss, grad, metrics = loss_and_grad(algo, batch._replace(mask=torch.zeros_like(batch.mask)))
    assert loss == grad.norm() == 0
    assert all(value == 0 for value in metrics.values())
    mask = batch.mask.clone()
    mask[2:] = False
    loss, grad, _ = loss_and_grad(algo, batch._replace(mask=mask))
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert grad[2:].abs().sum() == 0


def test_rows_without_an_image():
    """They have no KL_prcp, in value or gradient, and do not count in masked_entropy."""
    batch = random_batch().without_advantages()
    has_image = torch.tensor([True, False, True, False, False, True])
    algo = replace(POLICY_GRADIENT, kl_prcp_coef=1.0, masked_entropy_coef=0.1)
    _, grad, metrics = loss_and_grad(algo, batch, has_image=has_image)
    assert grad[~has_image].abs().sum() == 0
    assert grad[has_image].abs().sum() > 0
    with_image = batch.mask & has_image[:, None]
    expected = -batch.masked[with_image].mean()
    assert metrics["masked_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    k3 = kl_k3(batch.log_probs, batch.masked)
    expected = k3[with_image].sum() / batch.mask.sum()  # the mean is over all tokens
    assert metrics["kl_prcp"].item() == pytest.approx(expected.item(), rel=1e-5)
    _, grad, metrics = loss_and_grad(algo, batch, has_image=torch.zeros(6, dtype=torch.bool))
    assert grad.norm() == metrics["masked_entropy"] == metrics["kl_prcp"] == 0


def test_missing_log_probs_are_an_error():
    batch = random_batch()
    args = (batch.log_probs, batch.old, batch.advantages, batch.mask)
    with pytest.raises(ValueError, match="kl_ref_coef=0.01 needs ref_log_probs"):
        papo_loss(*args, preset("grpo"))
    with pytest.raises(ValueError, match="kl_prcp_coef.*masked_log_probs"):
        papo_loss(*args, preset("papo_g"), batch.ref)
