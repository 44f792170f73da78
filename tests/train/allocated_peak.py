"""How much memory operations take on a CPU, which has no allocator that says so."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocatedPeak(TorchDispatchMode):
    """The most bytes that new tensors held at once while it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        given = {self._address(leaf) for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self._address(leaf) not in given | self._known:
                self._add(leaf)
        return result

    @staticmethod
    def _address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, tensor: torch.Tensor) -> None:
        storage, address = tensor.untyped_storage(), self._address(tensor)
        self._known.add(address)
        self._held += storage.nbytes()
        self.bytes = max(self.bytes, self._held)
        weakref.finalize(storage, self._drop, address, storage.nbytes())

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._held -= size
