"""FAISS behind knn, imported when it is asked for: it searches float32 copies, its finds are ranked in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdw_fast.ops._backend import cuda_stream
from sdw_fast.ops._knn_search import READ_ROWS, Rows, Search

GPU_MAX_K = 2048  # of faiss.knn_gpu

Find = Callable[[torch.Tensor], torch.Tensor]  # (B, D) float32 queries -> (B, wanted) rows of the references


class Centered:
    """Points as FAISS gets them: float32, from the references' mean."""

    def __init__(self, references: Rows) -> None:
        total = sum(references.double(r, r + READ_ROWS).sum(0) for r in range(0, len(references), READ_ROWS))
        self.center = total / len(references)

    def __call__(self, points: Rows, first: int, last: int) -> torch.Tensor:
        return (points.double(first, last) - self.center).float()


def faiss_search(search: Search, factory: str) -> None:
    """A FAISS index over centered copies; its finds are ranked in float64."""
    queries, references, k = search.queries, search.references, search.k
    centered = Centered(references)
    # One more than asked: the query itself is usually among them. Duplicates can push it out; then the last one goes.
    wanted = min(k + search.is_self_join, len(references))
    on_gpu = queries.device.type == "cuda" and has_gpu()
    flat = on_gpu and factory == "Flat" and wanted <= GPU_MAX_K
    find = (brute_force_on_gpu if flat else index_search)(references, centered, wanted, factory, on_gpu)
    step = 32768 if on_gpu else 4096
    for q in range(0, len(queries), step):
        x = queries.double(q, q + step)  # [B, D]
        found = find(centered(queries, q, q + step)).to(x.device).sort(1).values  # [B, k + 1]
        distance = (x[:, None] - references.take(found.clamp(min=0))).square().sum(-1).sqrt()  # [B, k + 1]
        distance.masked_fill_(found < 0, torch.inf)  # what an approximate index missed
        if search.is_self_join:  # the query itself comes last, behind what is missing, and is cut off
            distance.masked_fill_(found == torch.arange(q, q + x.shape[0], device=x.device)[:, None], torch.inf)
        order = distance.argsort(dim=1, stable=True)[:, :k]
        search.write(slice(q, q + x.shape[0]), distance.gather(1, order), found.gather(1, order))
        search.report(q + x.shape[0])


def has_gpu() -> bool:
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def brute_force_on_gpu(references: Rows, centered: Centered, wanted: int, factory: str, on_gpu: bool) -> Find:
    """Brute force on the GPU where the tensors lie, without an index and without a copy through the host."""
    import faiss
    import faiss.contrib.torch_utils  # teaches knn_gpu tensors

    resources = faiss.StandardGpuResources()
    y = torch.empty((len(references), references.dims), dtype=torch.float32, device=references.device)
    for r in range(0, y.shape[0], READ_ROWS):
        y[r : r + READ_ROWS] = centered(references, r, r + READ_ROWS)

    def find(block: torch.Tensor) -> torch.Tensor:
        with cuda_stream(block):
            return faiss.knn_gpu(resources, block, y, wanted)[1]

    return find


def index_search(references: Rows, centered: Centered, wanted: int, factory: str, on_gpu: bool) -> Find:
    """The index that `factory` names, on all GPUs or on the CPU."""
    import faiss

    name, _, parameters = factory.partition(";")
    try:
        index = faiss.index_factory(references.dims, name)
        if on_gpu:
            index = faiss.index_cpu_to_all_gpus(index)
        space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        if parameters:
            space.set_index_parameters(index, parameters)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(f"knn: FAISS does not know the index {factory!r}: {error}") from error
    if not index.is_trained:
        index.train(centered(references, 0, len(references)).cpu().numpy())
    for r in range(0, len(references), READ_ROWS):
        index.add(centered(references, r, r + READ_ROWS).cpu().numpy())
    return lambda block: torch.from_numpy(index.search(block.cpu().numpy(), wanted)[1])
