"""Diversity, repetition and length of completions: counts of n-grams, and self-BLEU by sacrebleu.

Words are maximal runs of characters without white space, in lower case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median, pstdev

from ..utils.validation import check_count


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Returns all n-grams of a text, in order.

    Example:
        >>> ngrams("The cat sat", 2)
        [('the', 'cat'), ('cat', 'sat')]
    """
    words = text.lower().split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Computes distinct-n, the share of different n-grams among all of them.

    Paper: Li et al., 2016 (arXiv:1510.03055). It falls with the length and number of the texts: compare equal numbers.

    Args:
        texts: completions.
        n: words of an n-gram, at least 1.

    Returns:
        A number in (0, 1]; nan without any n-gram.

    Raises:
        ValueError: ``n`` is below 1.

    Example:
        >>> distinct_n(["a b a", "a b"], 2)
        0.6666666666666666
    """
    check_count("n", n, "1 and 2 are usual")
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else float("nan")


def repetition(text: str, n: int = 3) -> float:
    """Computes the share of a text's n-grams that occurred before in it.

    Args:
        text: a completion.
        n: words of an n-gram, at least 1.

    Returns:
        A number in [0, 1); 0 for a text of fewer than n words.

    Raises:
        ValueError: ``n`` is below 1.

    Example:
        >>> repetition("a b c a b c", n=3)
        0.25
    """
    check_count("n", n, "3 is usual")
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Computes self-BLEU, the mean BLEU of each text with the others as its references; lower is more diverse.

    Paper: Texygen (Zhu et al., 2018, arXiv:1802.01886). BLEU is sacrebleu's sentence BLEU with its defaults.

    Args:
        texts: at least two.

    Returns:
        A number in [0, 100].

    Raises:
        ModuleNotFoundError: sacrebleu is not installed.
        ValueError: fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU of {len(texts)} texts is not defined: give at least two samples per prompt")
    try:
        from sacrebleu import sentence_bleu
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("self-BLEU needs sacrebleu: pip install 'rlhf-lightning[evaluation]'") from error
    return fmean(sentence_bleu(text, [*texts[:place], *texts[place + 1 :]]).score for place, text in enumerate(texts))


def unique_share(answers: Sequence[object]) -> float:
    """Computes the share of different ones among the answers to a prompt; ``None`` is not counted.

    Example:
        >>> unique_share(["3", "3", "5", None])
        0.6666666666666666
    """
    given = [answer for answer in answers if answer is not None]
    return len(set(given)) / len(given) if given else float("nan")


def length_statistics(lengths: Sequence[float]) -> dict[str, float]:
    """Computes mean, median, standard deviation, minimum and maximum of the lengths of completions.

    Example:
        >>> length_statistics([1, 2, 6])["median"]
        2.0
    """
    if not lengths:
        return {}
    values = [float(length) for length in lengths]
    return {
        "mean": fmean(values),
        "median": median(values),
        "std": pstdev(values),
        "min": min(values),
        "max": max(values),
    }
