"""What Triton modules would launch, for the gate that compiles it ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from unittest import mock


@contextlib.contextmanager
def recorded(architecture: int, *modules: ModuleType) -> Iterator[list[tuple]]:
    """Within the block the launches of these modules, (kernel, arguments, options), are listed instead of done, as for
    this architecture. The ops run on meta tensors then."""
    launches: list[tuple] = []

    def launch(kernel, grid, like, *args, **options):
        launches.append((kernel, args, options))

    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, instead in (("launch", launch), ("architecture_of", lambda device: architecture)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, instead))
        yield launches
