"""Quality against cost, on random weights: what must hold whatever the model."""

import numpy as np
import pytest

from cineray.jobs.quality import check_policies, measure_quality
from cineray.pipeline.compare import psnr_db
from cineray.pipeline.request import InputError


def test_psnr_of_known_errors():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(black, black) == float("inf")
    assert psnr_db(black, black + 255) == 0.0
    assert psnr_db(black + 10, black) == pytest.approx(28.13, abs=0.01)


def test_rows_compare_with_the_uncached_clip(loaded, new_request):
    model = loaded("wan")
    requests = [new_request(num_inference_steps=12, seed=s) for s in (1, 2)]
    policies = ["dicache(threshold=0)", "dicache(threshold=0.5)", "fewer-steps(6)"]
    seen = []
    off, cached, fewer = measure_quality(model, requests, policies, lambda *args: seen.append(args))
    assert (off.speedup, off.psnr_db, off.worst_psnr_db) == (1.0, 100.0, 100.0)
    assert cached.speedup > 1.1
    assert cached.worst_psnr_db <= cached.psnr_db < 100
    assert (fewer.cost, fewer.speedup, fewer.num_clips) == (0.5, 2.0, 2)
    assert len(seen) == 8


def test_an_unknown_policy_is_bad_input(loaded):
    check_policies(["fewer-steps(6)", "none"], loaded("wan"))
    with pytest.raises(InputError, match="unknown policy 'dicash'"):
        check_policies(["dicash"], loaded("wan"))
