"""Questions with groups of answers of random ids, and the losses of GRPO as the papers write them, in torch."""

import numpy as np

from spt_jax.data.examples import Example
from tests.examples import HEAD, INNER, VOCAB

GROUP = 3


def random_groups(count: int, longest: int, seed: int = 0) -> list[Example]:
    """Questions with three answers of 1 to `longest` ids; virtual tokens stand in two places."""
    random = np.random.default_rng(seed)
    groups = []
    for index in range(count):
        ids = np.concatenate([HEAD, random.integers(3, VOCAB, 2 + index % 4), INNER, [7]]).astype(np.int32)
        sizes = random.integers(1, longest + 1, GROUP)
        answers = tuple(random.integers(3, VOCAB, size).astype(np.int32) for size in sizes)
        groups.append(Example(ids, np.zeros(len(ids), bool), answers, 0, index))
    return groups


def paper_loss(variant: str, rewards, own, old, base, beta: float, clip: tuple[float, float], longest: int):
    """The loss of some groups, one token at a time.

    variant: grpo is eq. 3 and 4 of DeepSeekMath (arXiv 2402.03300), with the KL divergence of its section 4.1.1;
      dr_grpo is the objective of arXiv 2503.20783, figure 1; dapo is eq. 8 of arXiv 2503.14476.
    rewards: for each group, the rewards of its answers.
    own, old, base: for each group and answer, the log-probabilities of its tokens under the prompt, under the prompt
      that sampled it and under the bare base, in torch.
    """
    totals, tokens, answers = [], 0, 0
    for group, own_group, old_group, base_group in zip(rewards, own, old, base, strict=True):
        mean, deviation = sum(group) / len(group), np.std(group, ddof=1)
        if variant == "dapo" and len(set(group)) == 1:
            continue
        for reward, p, q, r in zip(group, own_group, old_group, base_group, strict=True):
            advantage = reward - mean
            if variant != "dr_grpo" and deviation > 0:
                advantage = advantage / deviation
            total = 0.0
            for log_p, log_q, log_r in zip(p, q, r, strict=True):
                ratio = (log_p - log_q).exp()
                surrogate = ratio.mul(advantage).minimum(ratio.clamp(1 - clip[0], 1 + clip[1]).mul(advantage))
                divergence = (log_r - log_p).exp() - (log_r - log_p) - 1
                total = total + surrogate - beta * divergence
            totals.append(total / {"grpo": len(p), "dr_grpo": longest, "dapo": 1}[variant])
            tokens, answers = tokens + len(p), answers + 1
    return -sum(totals) / (tokens if variant == "dapo" else answers)
