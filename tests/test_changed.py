"""Digits that became others, against the labels that people gave them."""

import numpy as np
import pytest
import torch

from common.ddpm.digits import load_labelled_digits
from common.metrics import changed
from common.metrics.changed import changed_digits, share_changed


@pytest.fixture(scope="module")
def labelled():
    return load_labelled_digits("mnist5k", "test")


def test_digits_that_became_others_are_those_with_other_labels(labelled):
    digits, labels = labelled
    after = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    named = set(changed_digits(digits, digits[after]))
    truth = set((labels != labels[after]).nonzero().flatten().tolist())
    assert len(named & truth) > 0.99 * len(named) and len(named) > 0.9 * len(truth)


def test_what_stays_a_digit_or_cannot_be_read_does_not_count(labelled):
    digits, labels = labelled
    ones = digits[labels == 1][:20]
    assert changed_digits(ones, ones.flip(0)) == []  # other ones
    assert changed_digits(ones, ones // 2) == []
    assert changed_digits(ones, torch.zeros_like(ones)) == []


def test_a_digit_of_which_the_classifier_is_not_sure_does_not_count(labelled, monkeypatch):
    """Half of one digit over half of another may be either; where any answer counts, most pairs differ."""
    digits, labels = labelled
    fours, nines = digits[labels == 4][:40].int(), digits[labels == 9][:40].int()
    blends = ((fours + nines) // 2).to(torch.uint8)
    named = changed_digits(blends, blends.flip(0))
    monkeypatch.setattr(changed, "SURE", 0.0)
    assert len(named) < len(changed_digits(blends, blends.flip(0)))


def test_the_share_and_its_error(labelled):
    digits, labels = labelled
    ones, zeros = digits[labels == 1][:80], digits[labels == 0][:80]
    share, error = share_changed(ones, torch.cat([zeros[:20], ones[20:]]))
    assert share == pytest.approx(0.25, abs=0.02) and error == pytest.approx(np.sqrt(0.25 * 0.75 / 80), rel=0.05)
    none, error = share_changed(ones, ones)
    assert none == 0 and 1 / 160 < error < 1 / 40  # of 80 without one, the share is below 3 / 80 with 95%
