"""TAPO, "triplet augmented": PAPO_D with two further images per question.

    images_pos    another image with the same answer; half of the responses are sampled and trained
                  under it, and all 2n responses to a question form one group
    images_neg    an image with another answer, in place of PAPO's masked view:
                  - gamma KL(pi || pi_neg), each response's pi under its own image

Source: the authors' code, github.com/PKU-ICST-MIPL/FineR1_ICLR2026, where the columns are called
image_noisy and image_aug. It has n = 5, 384 prompts in mini-batches of 128 for 3B (192/64 for 7B).
Differences: without images_neg it masks as PAPO does; here such rows are skipped and counted. Its
reward asks that the true answer occur in the <answer> text, ours compares the boxed answer. Both
further images are resized to the size of the first, as there.
"""

from dataclasses import dataclass, replace

from papo import Algo


@dataclass(frozen=True)
class TAPO(Algo):
    kl_ref_coef: float = 0.0
    kl_prcp_coef: float = 0.01
    entropy_coef: float = 0.03
    masked_entropy_coef: float = 0.03
    clip_high: float = 0.28
    dynamic_sampling: bool = True

    image_columns = ("images_pos", "images_neg")

    def sample(self, prompts, policy, sample_groups, key):
        return sample_groups(
            [image for prompt in prompts for image in (prompt, positive_of(prompt))]
        )

    def view(self, name, prompt, policy, generator):
        return prompt.more_pixel_values["images_neg"]


def positive_of(prompt):
    """The prompt under its positive image."""
    if prompt.pixel_values is None:
        return prompt
    return replace(prompt, pixel_values=prompt.more_pixel_values["images_pos"])
