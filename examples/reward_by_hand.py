"""A reward model in one file: plain PyTorch, one sequence at a time.

Paper: InstructGPT (Ouyang et al., 2022, arXiv:2203.02155). A row is a prompt x with a chosen completion y_c and a
rejected one y_r. A linear head on a decoder's hidden state at the last token gives the reward of a completion, and the
model of Bradley and Terry turns a difference of rewards into the probability that one completion is preferred:

    r(x, y) = w . h(x, y)
    L       = mean over rows of -log sigmoid(r(x, y_c) - r(x, y_r))

Only differences are learned: adding a constant to all rewards changes no loss.

    python examples/reward_by_hand.py                  # a tiny random model
    python examples/reward_by_hand.py --model FOLDER   # your own: a folder or a Hugging Face id

`RewardModule` computes the same for packed rows, in micro-batches and on several ranks:
`tests/examples/test_by_hand.py` compares the losses and the final weights of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

LEARNING_RATE = 1e-4  # for the tiny model; 1e-5 is usual for a pretrained one
MAX_GRAD_NORM = 1.0

ROWS = [
    {"prompt": "2+3=?", "chosen": "2+3=5\n#5", "rejected": "#4"},
    {"prompt": "7+1=?", "chosen": "7+1=8\n#8", "rejected": "#9"},
    {"prompt": "4+5=?", "chosen": "4+5=9\n#9", "rejected": "4+5=8\n#8"},
    {"prompt": "1+2+3=?", "chosen": "1+2=3\n3+3=6\n#6", "rejected": "#7"},
]


class RewardModel(nn.Module):
    """Scores sequences: a decoder without its output projection, and a linear head.

    Args:
        folder: of a language model, or its Hugging Face id.
        dtype: of all weights.
    """

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.decoder = AutoModel.from_pretrained(folder, dtype=dtype)
        width = self.decoder.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False, dtype=dtype)
        # Rewards of about 1 in size, whatever the width: the loss starts near log 2 = 0.6931, that of equal rewards.
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens: list[int]) -> Tensor:
        """Computes the reward of one sequence, a scalar."""
        states = self.decoder(torch.tensor([tokens])).last_hidden_state[0]
        # In a causal decoder the last token alone has seen the whole completion.
        return self.head(states[-1]).squeeze()


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """Tokenizes a prompt with a completion; the end-of-sequence token, where the reward is read, is the last."""
    continuation = tokenizer.encode(completion, add_special_tokens=False)
    return [*tokenizer.encode(prompt), *continuation, tokenizer.eos_token_id]


def pair_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, str]) -> Tensor:
    """Computes the loss of one row."""
    chosen = model(tokenize(tokenizer, row["prompt"], row["chosen"]))
    rejected = model(tokenize(tokenizer, row["prompt"], row["rejected"]))
    return -F.logsigmoid(chosen - rejected)


def train(
    folder: str, rows: Sequence[Mapping[str, str]], steps: int, dtype: torch.dtype = torch.float32
) -> tuple[list[float], RewardModel]:
    """Trains a reward model on all rows at once, for a number of steps.

    Returns:
        The loss before each step, and the trained model.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Evaluation mode: without dropout, rewards are trained as they are used later.
    model = RewardModel(folder, dtype).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    losses = []
    for step in range(1, steps + 1):
        loss = torch.stack([pair_loss(model, tokenizer, row) for row in rows]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    return losses, model


def save_random_model(folder: str) -> None:
    """Writes the untrained model of the quickstart, with 0.6 million parameters and a token for each character."""
    nano = Path(__file__).resolve().parents[1] / "configs" / "models" / "nano"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(nano)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(nano).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="A reward model by hand.")
    parser.add_argument("--model", help="a folder or a Hugging Face id; without it, a tiny random model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        if options.model is None:
            save_random_model(folder)
        train(options.model or folder, ROWS, options.steps)


if __name__ == "__main__":
    main()
