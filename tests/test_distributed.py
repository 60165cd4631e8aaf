"""DistributedNetwork against DecoupledNetwork: the same training by 2 and 4 processes and by one."""

from __future__ import annotations

import distributed_jobs as jobs
import pytest
import ranks
import torch

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("n_layer", "n_data"), [(2, 1), (1, 2), (2, 2)])
def test_many_processes_train_like_one(tmp_path, n_layer, n_data):
    whole = jobs.train_alone("mixed", torch.float64)
    runs = ranks.run(jobs.train_together, n_layer * n_data, tmp_path / "job", "mixed", torch.float64, n_layer, n_data)
    for run in runs:
        for got, expected in zip(run[:3], whole[:3], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(run.net, whole.net, rtol=1e-10, atol=1e-10)
        for got, expected in ((run.z, whole.z), (run.multiplier, whole.multiplier)):
            rows = slice(run.shard.start, run.shard.stop)
            wanted = {t: expected[t][rows] for t in got}
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert sorted(t for run in runs for t in run.z) == sorted(list(whole.z) * n_data)
