"""CUDA graphs for inference: at batch 1 a backbone's time goes into launching its kernels one by one."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor, nn

Maps = tuple[Tensor, ...]


class GraphedForward:
    """Records a module's forward once for each size of image and replays it.

    What is recorded reads the weights where they are: training on or loading others into them needs no new record,
    moving them does and gets one.

    Args:
        module: whose weights ``forward`` reads.
        forward: (B, 3, H, W) -> feature maps.
        sizes: how many records are kept, the latest used ones; all work in the same memory, of the largest's size.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Maps], sizes: int) -> None:
        self.module = module
        self.forward = forward
        self.sizes = sizes
        self._records: OrderedDict[tuple, Callable[[Tensor], Maps]] = OrderedDict()
        self._pool = None
        self._lock = Lock()  # a record's input and output are its own, once

    def __call__(self, image: Tensor) -> Maps:
        """The maps of an image, in memory of their own."""
        weights = tuple(p.data_ptr() for p in self.module.parameters())
        autocast = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        key = (image.shape, image.dtype, image.device, autocast, hash(weights))
        with self._lock:
            if key not in self._records:
                while len(self._records) >= self.sizes:
                    self._records.popitem(last=False)
                self._records[key] = self._record(image)
            self._records.move_to_end(key)
            return self._records[key](image)

    def _record(self, image: Tensor) -> Callable[[Tensor], Maps]:
        given = image.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are chosen and compiled before the recording
            for _ in range(3):
                self.forward(given)
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            maps = self.forward(given)

        def replay(image: Tensor) -> Maps:
            given.copy_(image)
            graph.replay()
            return tuple(m.clone() for m in maps)

        return replay
