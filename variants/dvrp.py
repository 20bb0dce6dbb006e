"""DVRP (arXiv 2601.06801): push the policy away from a masked view, pull it to a noised one.

    L = L_pg - 0.01 KL(pi || pi_mask) + 0.01 KL(pi || pi_noised) + 0.05 (H_mask + H_noised)

A response should change when the image is hidden, and stay when it is only harder to read.

    k(t) = int(500 sigmoid(10 (1/2 - t / t_max)))     diffusion steps of noise at step t of t_max

Source: a third-party re-implementation; the authors published no code. Its mask is PAPO's, at 0.6,
its noise NoisyRollout's. It has no KL_ref.
Difference: H_noised is left out, because the source's entropies carry no gradient. For the same
reason H_mask is only logged, as in PAPO.
"""

from dataclasses import dataclass, replace

from papo import Algo
from support.config import flag
from variants.noisy_rollout import add_noise, falling


@dataclass(frozen=True)
class DVRP(Algo):
    kl_ref_coef: float = 0.0
    kl_prcp_coef: float = 0.01
    masked_entropy_coef: float = 0.05
    noised_coef: float = flag(0.01, "weight of KL(pi || pi_noised), which is minimised")
    noise_steps: int = flag(500, "diffusion steps of noise at first", low=0, high=999)
    noise_slope: float = flag(10.0, "how steeply the noise falls; half is left at half time")

    def at_step(self, step, n_steps):
        past_middle = step / n_steps - 0.5
        return replace(self, noise_steps=falling(self.noise_steps, self.noise_slope * past_middle))

    def views(self):
        return (*super().views(), "noised")

    def view(self, name, prompt, policy, generator):
        if name == "mask":
            return super().view(name, prompt, policy, generator)
        images = policy.encoder.image_processor
        return add_noise(prompt.pixel_values, self.noise_steps, images, generator)
