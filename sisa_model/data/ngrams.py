"""What counting alone predicts: the losses that a trained model is seen beside."""

import numpy as np


def ngram_losses(
    train: np.ndarray, targets: np.ndarray, contexts: np.ndarray, vocab: int
) -> tuple[float, float]:
    """Held-out losses of a unigram and a bigram model, nats a token.

    Both are counted on ``train`` (int32 [N]). The unigram is add-one smoothed; the bigram backs
    off to it with the weight of ten observations a context."""
    unigram = (np.bincount(train, minlength=vocab) + 1.0) / (len(train) + vocab)
    followed = train[:-1].astype(np.int64) * vocab + train[1:]
    pairs, pair_counts = np.unique(followed, return_counts=True)
    wanted = contexts.astype(np.int64) * vocab + targets
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    context_counts = np.bincount(train[:-1], minlength=vocab)[contexts]
    bigram = (seen + 10 * unigram[targets]) / (context_counts + 10)
    return float(-np.log(unigram[targets]).mean()), float(-np.log(bigram).mean())
