"""DyCo-RL: weigh responses by how well their attention fits each token's role.

Let a_t be the last layer's attention, mean over heads, of the position that predicts token t. Its
visual part lies on the prompt's image tokens (from the first to the last), its textual part on
everything after them, the response included. For either part m,

    r_m,t = the part's share of a_t
    v_m,t = 2 arccos sum sqrt(p_m,t-1 p_m,t)     how far the part moves, p_m,t = the part as a
                                                 distribution (Fisher-Rao distance)
    token t is visual if v_vis - v_txt > 0, textual if it is < -0.05, else neutral
    s_t   = r_m,t / (r_vis,t + r_txt,t) of its role's part m
    score = tanh(z-score over the batch of sigmoid(mean s_t over tokens with a role))
    A_i <- A_i clamp(1 + 0.2 score_i, 0.8, 1.2)

A response of fewer than 60 tokens gets score -1.

Source: the authors' code, github.com/Sammy20207109/DyCo-RL, on GRPO with beta 0.04 (n = 4), which
averages per response. As DAPO: --average token --kl_ref_coef 0 --clip_high 0.28. Above 5e9
parameters: --shortest_response 150.
Differences: it counts steps after a response's end, takes the last image token for text, has the
mean over all prompt positions as a_0 (ours: the last's), and one device's 4 responses as the batch
of the z-score (ours: the mini-batch on all ranks). Its advantages have eps 1e-4, its k3 no clamp,
its DAPO drops truncated responses. Responses without an image keep weight 1 here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from papo import Algo
from support.batch import Group
from support.config import flag
from support.distributed import concat_over_ranks


@dataclass(frozen=True)
class DyCoRL(Algo):
    kl_ref_coef: float = 0.04
    kl_prcp_coef: float = 0.0
    clip_high: float = 0.2
    average: Literal["token", "seq"] = "seq"
    strength: float = flag(0.2, "largest change of an advantage, as a share of it", low=0, high=1)
    neutral_margin: float = flag(0.05, "by how much v_txt exceeds v_vis at a textual token")
    shortest_response: int = flag(60, "responses of fewer tokens get score -1 (7B: 150)")

    def weigh(self, groups, policy):
        alignments = attention_alignments(policy, groups, self.neutral_margin)
        pairs = list(zip(groups, alignments, strict=True))
        mine = [value for group, each in pairs if group.has_image for value in each.tolist()]
        all_alignments = torch.tensor(concat_over_ranks(mine), dtype=torch.float64)
        return [self._weights(group, each, all_alignments)[:, None] for group, each in pairs]

    def _weights(self, group: Group, alignments: Tensor, all_alignments: Tensor) -> Tensor:
        if not group.has_image:
            return torch.ones(len(alignments))
        too_short = group.response_mask.sum(1) < self.shortest_response
        scores = standardised(alignments, all_alignments).masked_fill(too_short, -1.0)
        return (1 + self.strength * scores).clamp(1 - self.strength, 1 + self.strength).float()


def standardised(alignments: Tensor, all_alignments: Tensor) -> Tensor:
    """tanh of the z-scores of alignments[G] among the mini-batch's; 0 where all are equal."""
    if len(all_alignments) < 2 or all_alignments.std() <= 1e-8:
        return torch.zeros_like(alignments)
    return torch.tanh((alignments - all_alignments.mean()) / all_alignments.std())


def attention_alignments(policy, groups: list[Group], margin: float) -> list[Tensor]:
    """sigmoid(mean s) of every response, [G] float64 per group; all ranks call it."""
    last_layer = policy.model.config.get_text_config().num_hidden_layers - 1

    def of_pack(pack: list[Group]) -> Tensor:
        lengths, found = [group.n_tokens for group in pack], []

        def probe(layer, query, key, value, scaling):
            if layer == last_layer:
                parts = (x[0].split(lengths, 1) for x in (query, key))
                for group, *q_and_k in zip(pack, *parts, strict=True):
                    found.append(group_alignments(group, *q_and_k, scaling, margin))

        policy.probe_attention(pack, probe)
        return torch.cat(found)[:, None]

    return [each[:, 0].double() for each in policy.per_group(groups, of_pack)]


def group_alignments(
    group: Group, query: Tensor, key: Tensor, scaling: float, margin: float
) -> Tensor:
    """sigmoid(mean s) of a group's responses, [G]. query[H, S, D], key[H_kv, S, D]: the group's."""
    image_tokens = group.prompt.is_image_token.nonzero()
    if len(image_tokens) == 0:
        return query.new_full((len(group.tokens),), 0.5)
    first, last = int(image_tokens[0]), int(image_tokens[-1])
    owner = group.owner.to(query.device)
    alignments = []
    for number in range(1, len(group.tokens) + 1):
        attention, visible = response_attention(query, key, scaling, owner, number)
        alignments.append(response_alignment(attention, visible, first, last, margin))
    return torch.stack(alignments)


def response_attention(query, key, scaling, owner: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """a[n, P + n - 1] of a response's n tokens, and the positions that each may attend to.

    owner[S], number: see Group.owner. a_0 is the prompt's last position's.
    """
    [prompt], [fed] = ((owner == whose).nonzero(as_tuple=True) for whose in (0, number))
    q = query[:, torch.cat([prompt[-1:], fed])]  # [H, n, D]
    k = key[:, torch.cat([prompt, fed])].repeat_interleave(len(query) // len(key), 0)
    scores = q.float() @ k.float().transpose(1, 2) * scaling  # bf16 scores would blur small shifts
    visible = torch.ones_like(scores[0], dtype=torch.bool).tril(len(prompt) - 1)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).mean(0), visible


def response_alignment(attention, visible, first: int, last: int, margin: float) -> Tensor:
    """sigmoid(mean s) of a response; image tokens at first..last. 0.5 where no token has a role."""
    visual, textual = attention[:, first : last + 1], attention[:, last + 1 :]
    shift = shifts(visual, visible[:, first : last + 1]) - shifts(textual, visible[:, last + 1 :])
    visual_share = visual.sum(1) / (visual.sum(1) + textual.sum(1))
    is_visual, is_textual = shift > 0, shift < -margin
    s = torch.where(is_visual, visual_share[1:], 1 - visual_share[1:])
    has_role = is_visual | is_textual
    mean = (s * has_role).sum() / has_role.sum().clamp(min=1)
    return torch.where(has_role.any(), mean.sigmoid(), 0.5)


def shifts(part: Tensor, visible: Tensor) -> Tensor:
    """v[n - 1]: how far a part[n, K] of the attention moves from each token to the next."""
    before, after = part[:-1], part[1:] * visible[:-1]
    before = before / before.sum(1, keepdim=True).clamp(min=1e-12)
    after = after / after.sum(1, keepdim=True).clamp(min=1e-12)
    return 2 * (before * after).sqrt().sum(1).clamp(0, 1).arccos()
