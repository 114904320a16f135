"""Direct preference optimisation (DPO) in one file: plain PyTorch, one sequence at a time.

Paper: Rafailov et al., 2023, arXiv:2305.18290. A row is a prompt x with a chosen completion y_c and a rejected one y_r.
The policy pi starts equal to the frozen reference pi_ref, and what it has learned about a completion is its reward:

    r(y) = beta * (log pi(y | x) - log pi_ref(y | x))
    L    = mean over rows of -log sigmoid(r(y_c) - r(y_r))

Both rewards are 0 at the start, so the first loss is log 2 = 0.6931. A larger beta holds the policy nearer to the
reference: it reaches the same difference of rewards with a smaller change of probabilities.

    python examples/dpo_by_hand.py                  # a tiny random model
    python examples/dpo_by_hand.py --model FOLDER   # your own: a folder or a Hugging Face id

`DPOModule` computes the same for packed rows, in micro-batches and on several ranks:
`tests/examples/test_by_hand.py` compares the losses and the final weights of both. Where its parts are:

    here                          in rlhf_lightning/
    tokenize                      data/tokenization.py: RowTokenizer.answers, both completions in one tree
    completion_logp               modules/dpo.py: grad_rows, by token_stats and sum_per_sequence
    the same of the reference     modules/dpo.py: reference_rows; the model is that of core/reference_policy.py
    rewards and their difference  losses/preference_losses.py: PreferencePairs.margin
    -logsigmoid                   losses/preference.py: preference_loss, with loss_type sigmoid
    the mean over rows            modules/dpo.py: loss, a sum divided by the pairs of normalizers
    train                         core/module.py: optimize
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

BETA = 0.1
LEARNING_RATE = 1e-4  # for the tiny model; 1e-6 is usual for a pretrained one
MAX_GRAD_NORM = 1.0

ROWS = [
    {"prompt": "2+3=?", "chosen": "2+3=5\n#5", "rejected": "#4"},
    {"prompt": "7+1=?", "chosen": "7+1=8\n#8", "rejected": "#9"},
    {"prompt": "4+5=?", "chosen": "4+5=9\n#9", "rejected": "4+5=8\n#8"},
    {"prompt": "1+2+3=?", "chosen": "1+2=3\n3+3=6\n#6", "rejected": "#7"},
]


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Tokenizes a prompt, and its completion with the end-of-sequence token.

    Separately, because generation continues the tokens of the prompt alone. The end is part of the completion: when to
    stop is learned as well.
    """
    continuation = tokenizer.encode(completion, add_special_tokens=False)
    return tokenizer.encode(prompt), [*continuation, tokenizer.eos_token_id]


def completion_logp(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Computes log pi(completion | prompt): the sum of the log-probabilities of its tokens."""
    logits = model(torch.tensor([prompt + completion])).logits[0]
    # The logits at a position predict the token at the next one.
    log_p = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return log_p.gather(1, torch.tensor(completion)[:, None]).sum()


def pair_loss(
    policy: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, str]
) -> Tensor:
    """Computes the loss of one row."""
    rewards = []
    for name in ("chosen", "rejected"):
        prompt, completion = tokenize(tokenizer, row["prompt"], row[name])
        with torch.no_grad():
            ref_logp = completion_logp(reference, prompt, completion)
        rewards.append(BETA * (completion_logp(policy, prompt, completion) - ref_logp))
    chosen, rejected = rewards
    return -F.logsigmoid(chosen - rejected)


def train(
    folder: str, rows: Sequence[Mapping[str, str]], steps: int, dtype: torch.dtype = torch.float32
) -> tuple[list[float], nn.Module]:
    """Trains a model on all rows at once, for a number of steps.

    Returns:
        The loss before each step, and the trained policy.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Evaluation mode: with dropout, the policy would not start equal to the reference.
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    losses = []
    for step in range(1, steps + 1):
        loss = torch.stack([pair_loss(policy, reference, tokenizer, row) for row in rows]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    return losses, policy


def save_random_model(folder: str) -> None:
    """Writes the untrained model of the quickstart, with 0.6 million parameters and a token for each character."""
    nano = Path(__file__).resolve().parents[1] / "configs" / "models" / "nano"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(nano)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(nano).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="Direct preference optimisation by hand.")
    parser.add_argument("--model", help="a folder or a Hugging Face id; without it, a tiny random model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        if options.model is None:
            save_random_model(folder)
        train(options.model or folder, ROWS, options.steps)


if __name__ == "__main__":
    main()
