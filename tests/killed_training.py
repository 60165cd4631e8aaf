"""A small training run that is killed again and again: see test_resume.py."""

from __future__ import annotations

from pathlib import Path

import torch
from killed import Report

import lgd_kernels as lgd
from lgd_kernels.decoupled import Callback, Checkpoints, StoredValues, files, residual_net

EPOCHS, BATCH_SIZE, N = 4, 8, 52
STEPS = EPOCHS * 7


class Reporting(Callback):
    def __init__(self, report: Report):
        self.report = report

    def on_batch_end(self, training) -> None:
        self.report("step")


def run_training(report: Report, folder: Path) -> None:
    """Stored z on disk and multipliers, Adam with a cosine schedule; what came of it goes to folder/result."""
    torch.manual_seed(0)
    x = torch.randn(N, 6)
    net = lgd.DecoupledNetwork(residual_net(6, 8, 3, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    store = lgd.ActivationStore(N, [(8,)] * 3, location="disk", path=folder / "map")
    history = lgd.fit(
        net,
        (x, x[:, :4].argmax(1)),
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        mode=StoredValues(burn_in=4),
        store=store,
        callbacks=[Reporting(report)],
        checkpoint=Checkpoints(folder / "checkpoints", every=3),
        resume=True,
        log=folder / "log.csv",
        progress=False,
    )
    history.seconds.clear()  # all else must be the same in every run
    result = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "store": store.state_dict()}
    files.save(result | {"history": history.state_dict()}, folder / "result")
