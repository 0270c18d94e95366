"""What an outer step draws: θ_0, and batches of the outer problem, gathered and normalized where they are drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdw_fast.inner import InnerLoop
from sdw_fast.objectives import OuterProblem

# Outer states, targets and weights up to this size lie on the device; a larger problem stays in host memory.
RESIDENT_BYTES = 8 << 30


class OuterBatches:
    """Draws batches of an outer problem for a device: from there, or from host memory above RESIDENT_BYTES.

    Args:
        problem: Whose rows are drawn.
        device: Where the batches go.
        rows: Those that are drawn from, int64; None: all.

    Attributes:
        device: Where the rows lie and where the generators that draw them must live.
    """

    def __init__(self, problem: OuterProblem, device: torch.device, rows: np.ndarray | None = None) -> None:
        arrays = (problem.observations, problem.targets, problem.weights)
        resident = sum(array.nbytes for array in arrays) <= RESIDENT_BYTES
        self.device = device if resident else torch.device("cpu")
        self._target = device
        self._rows = None if rows is None else torch.from_numpy(rows).to(self.device)
        writable = (np.require(array, requirements=["C", "W"]) for array in arrays)  # PyTorch wants no others
        self._tensors = [torch.as_tensor(array, device=self.device) for array in writable]
        units = problem.units.states  # on the device once: to send them with every batch would be to wait for it
        self._offset, self._scale = (torch.from_numpy(x).to(device, torch.float32) for x in (units.offset, units.scale))

    def draw(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Returns the normalized states (B, D), targets (B, A) and weights (B,) of rows drawn with replacement."""
        count = len(self._tensors[0] if self._rows is None else self._rows)
        rows = torch.randint(count, (size,), generator=generator, device=self.device)
        return self.take(rows if self._rows is None else self._rows[rows])

    def take(self, rows: Tensor) -> list[Tensor]:
        """Returns the normalized states (B, D), targets (B, A) and weights (B,) of some rows of the problem."""
        batch = [tensor.index_select(0, rows) for tensor in self._tensors]
        if self.device != self._target:
            batch = [part.pin_memory().to(self._target, non_blocking=True) for part in batch]
        return [(batch[0] - self._offset) / self._scale, *batch[1:]]


class Draws:
    """The random numbers of R runs, each from its own seed.

    θ_0 of the step to come can be drawn ahead, which changes no number: it is what its generators draw next. On a GPU
    that is done on a stream of its own, beside the kernels of the step before, which leave multiprocessors idle.

    Args:
        loop: Whose θ_0 are drawn.
        batches: What the batches are drawn from.
        device: Of θ_0.
        seeds: Of the runs.
        batch_size: B, states of a batch.
    """

    def __init__(
        self, loop: InnerLoop, batches: OuterBatches, device: torch.device, seeds: Sequence[int], batch_size: int
    ) -> None:
        self._loop, self._batches, self._device, self._size = loop, batches, device, batch_size
        self._seeds = list(seeds)
        self._generators = self._seeded(self._seeds)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Drawn ahead: `state` before it, θ_0, and the generators that draw its rows.
        self._ahead: tuple[list[Tensor], list[Tensor], list[torch.Generator]] | None = None
        self._in_use: list[Tensor] = []
        self._offset = 0  # how far a captured step draws ahead, in the generators' random numbers

    def draw_ahead(self, initializations: Iterable[int], step: int) -> None:
        """Draws the θ_0 of the next call of `draw`, which must be given the same."""
        with torch.cuda.stream(self._stream):
            self._ahead = (self.state(), *self._initial(initializations, step))

    def draw(self, initializations: Iterable[int], step: int) -> tuple[list[Tensor], list[Tensor]]:
        """θ_0, and states (J·R, B, D), targets (J·R, B, A) and weights (J·R, B): of R runs for J initializations.

        Number 0 is drawn by generators that go on from step to step. Others have new ones in every step, so that
        nothing of them needs to be kept, and any process can draw them.
        """
        if self._ahead is None and self._stream is not None:  # the first θ_0 by the same stream as the others
            self.draw_ahead(initializations, step)
        if self._ahead is None:
            initial, generators = self._initial(initializations, step)
        else:
            _, initial, generators = self._ahead
            self._ahead = None
        if self._stream:
            self._hand_over(initial, torch.cuda.current_stream(self._device), self._stream)
        return initial, self._batch(generators)

    def capture(self, work: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Callable[[], Tensor]:
        """One CUDA graph of `work` on what `draw` gives, and of all that is drawn for it.

        For one initialization a step, and rows that lie on the device. θ_0 of the step to come is drawn beside `work`
        here too, and put where the next one reads it.

        Args:
            work: From θ_0 and a batch to a tensor; asks nothing back from the device.

        Returns:
            What takes the next step: it enqueues the graph, and returns the tensor, which the one after overwrites.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        assert self._ahead is not None
        assert self._stream is not None
        before, initial, generators = self._ahead
        own_stream = torch.cuda.current_stream(self._device)
        own_stream.wait_stream(self._stream)
        initial = [parameter.clone() for parameter in initial]
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Where a capture fails, PyTorch does not put the caller's stream back.
        capturing = torch.cuda.graph(graph, stream=_capture_stream(self._device), capture_error_mode="thread_local")
        with torch.cuda.stream(own_stream), capturing:
            current = torch.cuda.current_stream()
            batch = self._batch(generators)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                drawn = self._loop.initial(generators)
            result = work(initial, batch)
            current.wait_stream(self._stream)
            torch._foreach_copy_(initial, drawn)
        self._offset = generators[0].get_offset() - _put(torch.Generator(self._device), before[0][0]).get_offset()
        self._ahead, self._in_use = None, initial

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _batch(self, generators: Iterable[torch.Generator]) -> list[Tensor]:
        """A batch of each generator, side by side."""
        batches = [self._batches.draw(self._size, generator) for generator in generators]
        return [torch.stack(parts) for parts in zip(*batches, strict=True)]

    def _initial(self, initializations: Iterable[int], step: int) -> tuple[list[Tensor], list[torch.Generator]]:
        """θ_0 of J initializations, and their J·R generators of rows."""
        initials, generators = [], []
        for number in initializations:
            streams = [_stream(seed, number, step) for seed in self._seeds]
            of_policies, of_rows = self._seeded(streams) if number else self._generators
            initials.append(self._loop.initial(of_policies))
            generators += of_rows
        if len(initials) > 1:
            initials = [[torch.cat(parts) for parts in zip(*initials, strict=True)]]
        return initials[0], generators

    def _hand_over(self, initial: list[Tensor], current: torch.cuda.Stream, ahead: torch.cuda.Stream) -> None:
        """Lets the current stream use this θ_0, and the other one draw into the memory of the θ_0 before.

        That is kept until here: PyTorch gives memory back to the stream that it was allocated on, at once, so that the
        next draw could write where a step still reads. From here on it waits for the steps before, not for this one.
        """
        current.wait_stream(ahead)
        ahead.wait_stream(current)
        self._in_use = initial

    def _seeded(self, seeds: Sequence[int]) -> tuple[list[torch.Generator], list[torch.Generator]]:
        """Generators of the policies, and of the rows where those lie: the same ones on one device."""
        policies = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        if self._batches.device == self._device:
            return policies, policies
        return policies, [torch.Generator(self._batches.device).manual_seed(seed) for seed in seeds]

    def _kept(self) -> list[list[torch.Generator]]:
        policies, rows = self._generators
        return [policies] if rows is policies else [policies, rows]

    def state(self) -> list[Tensor]:
        """What `load` takes: copies of the generators' states, (R, bytes) for each device.

        They are those before θ_0 was drawn ahead: whoever goes on from them draws it again.
        """
        if self._ahead:
            return [states.clone() for states in self._ahead[0]]
        if self._offset:
            return [torch.stack([_earlier(generator, self._offset) for generator in self._generators[0]])]
        return [torch.stack([generator.get_state() for generator in group]) for group in self._kept()]

    def load(self, states: Sequence[Tensor]) -> None:
        """Puts the generators where those of `state` were."""
        self._ahead, self._offset = None, 0
        for group, kept in zip(self._kept(), states, strict=True):
            for generator, state in zip(group, kept.cpu(), strict=True):
                _put(generator, state)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: PyTorch's own is of the first device that captures, and cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


def _put(generator: torch.Generator, state: Tensor) -> torch.Generator:
    """The generator, where the state was taken."""
    return generator.set_state(state.clone())  # a view into other states is misaligned


def _earlier(generator: torch.Generator, offset: int) -> Tensor:
    """The state of a GPU's generator so many random numbers ago."""
    copy = _put(torch.Generator(generator.device), generator.get_state())
    copy.set_offset(copy.get_offset() - offset)
    return copy.get_state()


def _stream(seed: int, number: int, step: int) -> int:
    """The seed of an initialization's draws in a step, of the run's seed."""
    return int(np.random.SeedSequence([seed, number, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
