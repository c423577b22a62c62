"""Work for a GPU that is recorded once and then replayed: the thousands of kernels of a training step take longer to
launch one by one than to run."""

from collections.abc import Callable

import torch

WARM_UP = 3  # calls before the recording, in which libraries choose their algorithms and take their memory


class Replayed:
    """Calls `work(*inputs)`; on CUDA, after a few calls, by replaying what another one did (a CUDA graph).

    inputs: tensors on the device, of the same shapes at each call. `work` may change other tensors in place, and must
    not read numbers back from the device. It returns a tensor, which the next call writes over.
    """

    def __init__(self, work: Callable[..., torch.Tensor], device: torch.device):
        self.work, self.calls = work, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.stream is None:
            return self.work(*inputs)
        if self.graph is None and self.calls < WARM_UP:
            self.calls += 1
            return self._aside(*inputs)
        if self.graph is None:
            self._record(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result

    def _aside(self, *inputs: torch.Tensor) -> torch.Tensor:
        """On the stream that records, as CUDA asks for of a warm-up."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.work(*inputs)
        current.wait_stream(self.stream)
        return result

    def _record(self, *inputs: torch.Tensor) -> None:
        self.inputs = [given.clone() for given in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.result = self.work(*self.inputs)
