"""The right image against another one: the figures, against the scores that they sum up."""

import numpy as np
import pytest

from vig import score
from vig.analyses.held_out import right_against_other_image


def test_figures_are_those_of_the_scores(llava, records, image_folder) -> None:
    found = right_against_other_image(*llava, records, image_folder=image_folder)
    scores = score(*llava, records, null="shuffle", image_folder=image_folder)
    vig = np.array([one.token_vig.mean() for one in scores])
    assert found["captions"] == len(records)
    assert (found["mean_vig"], found["std_vig"]) == pytest.approx((vig.mean(), vig.std()), abs=1e-5)
    assert found["share_positive"] == np.mean(vig > 0)
    assert found["loss_other_photo"] - found["loss_right_photo"] == pytest.approx(found["mean_vig"], abs=1e-5)
    assert found["vig_by_word_class"]
