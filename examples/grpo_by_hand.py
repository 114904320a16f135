"""Group-relative policy optimisation (GRPO) in one file: plain PyTorch, one completion at a time.

Paper: DeepSeekMath (Shao et al., 2024, arXiv:2402.03300). The policy pi completes each prompt G times, a function
rewards the completions, and the better ones of each group become more likely. Completion i with the reward R_i
has the advantage A_i, and its token y_t the loss L_t:

    A_i  = (R_i - mean(R)) / (std(R) + 1e-4)
    L_t  = -min(r_t A_i, clip(r_t, 1 - epsilon, 1 + epsilon) A_i) + beta r_t KL_t
    r_t  = pi(y_t) / pi_old(y_t)       the ratio to the policy that sampled, 1 before the first update
    KL_t = 1 / q_t - 1 + log q_t       an estimate of KL(pi || pi_ref), with q_t = pi(y_t) / pi_ref(y_t)
    L    = sum of L_t over the tokens of all completions, divided by their number

The clipping (PPO, arXiv:1707.06347) stops a token's gradient once its ratio has moved far enough. KL_t is the estimator
k3 (Schulman, 2020); the factor r_t makes its gradient unbiased (DeepSeek-V3.2, arXiv:2512.02556, eq. 7). The paper
takes the mean over each completion and then over completions; the mean over all tokens, which weights each the same, is
that of DAPO (arXiv:2503.14476).

    python examples/grpo_by_hand.py                  # a tiny random model
    python examples/grpo_by_hand.py --model FOLDER   # your own: a folder or a Hugging Face id

`GRPOModule` computes the same with cached keys and values, packed rows, shared prompts and on several ranks:
`tests/examples/test_by_hand.py` compares the losses and the final weights of both.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.inference.sampling import derive_seed, uniforms

NUM_GENERATIONS = 8  # G
MAX_COMPLETION_LENGTH = 12
TEMPERATURE = 1.0
NUM_UPDATES = 2  # optimizer steps on the same completions
EPSILON = 0.2
BETA = 0.04
SEED = 0
LEARNING_RATE = 1e-3  # for the tiny model; 1e-6 is usual for a pretrained one
MAX_GRAD_NORM = 1.0

ROWS = [
    {"prompt": "2+3=?", "answer": "5"},
    {"prompt": "7+1=?", "answer": "8"},
    {"prompt": "4+5=?", "answer": "9"},
    {"prompt": "1+2+3=?", "answer": "6"},
]


class Sample(NamedTuple):
    """A completion, and all that stays fixed while the policy learns from it; the log-probs are those of its tokens."""

    prompt: list[int]
    completion: list[int]
    reward: float
    advantage: float
    old_logprobs: Tensor
    ref_logprobs: Tensor


def contains_answer(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Rewards completions that contain the answer: so lenient that a random model earns something."""
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]


@torch.no_grad()
def sample_completions(policy: nn.Module, prompt: list[int], seeds: list[int], end: int) -> list[list[int]]:
    """Draws one completion for each seed, token by token.

    The next token is the first whose cumulative probability exceeds a uniform random number. That number is a function
    of the seed and the position alone, so that the module, with its batches and caches, draws the same completions.
    """
    tokens = torch.tensor([prompt] * len(seeds))
    for position in range(MAX_COMPLETION_LENGTH):
        logits = policy(tokens).logits[:, -1].float() / TEMPERATURE
        cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
        uniform = torch.from_numpy(uniforms(seeds, [position] * len(seeds)))[:, None]
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        tokens = torch.cat([tokens, drawn], dim=1)
    completions = tokens[:, len(prompt) :].tolist()
    # The end-of-sequence token is part of the completion: when to stop is learned as well.
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions]


def token_logprobs(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Computes the log-probability of each token of a completion, at the temperature of sampling."""
    logits = model(torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
    # The logits at a position predict the token at the next one.
    log_p = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return log_p.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


@torch.no_grad()
def sample_group(
    policy: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, str], seed: int
) -> list[Sample]:
    """Samples and scores the completions of one prompt."""
    prompt = tokenizer.encode(row["prompt"])
    seeds = [derive_seed(seed, number) for number in range(NUM_GENERATIONS)]
    completions = sample_completions(policy, prompt, seeds, tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)

    # A group of equal rewards has advantages of 0: it says nothing about which completion is better.
    rewards = torch.tensor(contains_answer(texts, [row["answer"]] * len(texts)), dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)

    return [
        Sample(
            prompt,
            completion,
            reward,
            advantage,
            token_logprobs(policy, prompt, completion),
            token_logprobs(reference, prompt, completion),
        )
        for completion, reward, advantage in zip(completions, rewards.tolist(), advantages.tolist(), strict=True)
    ]


def token_losses(policy: nn.Module, sample: Sample) -> Tensor:
    """Computes the loss of each token of a completion."""
    logprobs = token_logprobs(policy, sample.prompt, sample.completion)
    ratio = (logprobs - sample.old_logprobs).exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    surrogate = torch.minimum(ratio * sample.advantage, clipped * sample.advantage)

    log_q = logprobs - sample.ref_logprobs
    kl = (-log_q).exp() - 1 + log_q
    return -surrogate + BETA * ratio * kl


def train(
    folder: str, rows: Sequence[Mapping[str, str]], steps: int, dtype: torch.dtype = torch.float32
) -> tuple[list[float], nn.Module]:
    """Trains a model on all prompts at once; each step samples new completions and makes all updates on them.

    Returns:
        The loss of each step, a mean over its updates, and the trained policy.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Evaluation mode: with dropout, ratios would not start at 1.
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    losses = []
    for step in range(steps):
        samples = []
        for number, row in enumerate(rows, start=1):
            # As in the module: the seed, the iteration, the row's id in a list of rows, and the attempt.
            seed = derive_seed(SEED, step, f"memory:{number}", 0)
            samples += sample_group(policy, reference, tokenizer, row, seed)

        updates = []
        for _ in range(NUM_UPDATES):
            loss = torch.cat([token_losses(policy, sample) for sample in samples]).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            updates.append(loss.item())

        losses.append(sum(updates) / NUM_UPDATES)
        reward = sum(sample.reward for sample in samples) / len(samples)
        print(f"step {step + 1}: loss {losses[-1]:.4f}, mean reward {reward:.3f}")
    return losses, policy


def save_random_model(folder: str) -> None:
    """Writes the untrained model of the quickstart, with 0.6 million parameters and a token for each character."""
    nano = Path(__file__).resolve().parents[1] / "configs" / "models" / "nano"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(nano)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(nano).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="Group-relative policy optimisation by hand.")
    parser.add_argument("--model", help="a folder or a Hugging Face id; without it, a tiny random model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        if options.model is None:
            save_random_model(folder)
        train(options.model or folder, ROWS, options.steps)


if __name__ == "__main__":
    main()
