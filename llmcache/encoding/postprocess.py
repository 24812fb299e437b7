"""Convert outputs to the results of `encode` and `predict` in sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.util import quantize_embeddings, truncate_embeddings

from llmcache.arrays import Floats32


def finished(
    outputs: Floats32 | torch.Tensor,
    model: SentenceTransformer,
    *,
    single: bool,
    precision: str | None,
    convert_to_numpy: bool,
    convert_to_tensor: bool,
    normalize: bool,
    truncate_dim: int | None,
) -> Any:
    """Truncate, normalise, quantise and convert vectors in the order of `SentenceTransformer.encode`.

    outputs: the model's vectors, [n, width]; float32 if an array. single: True if the input was one text.
    Returns a NumPy array, a tensor on the model's device, or a list of tensors; for a single text one vector.
    """
    to_numpy = convert_to_numpy and not convert_to_tensor
    dim = truncate_dim if truncate_dim is not None else model.truncate_dim
    plain = isinstance(outputs, np.ndarray) and to_numpy and precision in (None, "", "float32")
    if plain and not normalize and dim is None and model.dtype == torch.float32:  # nothing to do
        return outputs[0] if single else outputs
    result = _converted(outputs, model, precision, to_numpy, convert_to_numpy, convert_to_tensor, normalize, dim)
    return result[0] if single else result


@torch.inference_mode()
def _converted(
    outputs: Floats32 | torch.Tensor,
    model: SentenceTransformer,
    precision: str | None,
    to_numpy: bool,
    convert_to_numpy: bool,
    convert_to_tensor: bool,
    normalize: bool,
    dim: int | None,
) -> Any:
    """Convert vectors as `finished` does, without its shortcut; a batch also for a single text."""
    tensor = torch.from_numpy(outputs) if isinstance(outputs, np.ndarray) else outputs
    vectors = tensor.to(device="cpu" if to_numpy else model.device, dtype=model.dtype)
    if dim is not None:
        vectors = truncate_embeddings(vectors, dim)
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, p=2, dim=1)
    result: Any = vectors
    if precision and precision != "float32":
        result = quantize_embeddings(vectors, precision=precision)  # type: ignore[arg-type]  # checked by the callee
    if convert_to_tensor:
        result = torch.as_tensor(result)
    elif convert_to_numpy:
        if isinstance(result, torch.Tensor):  # NumPy has no bfloat16
            result = (result.float() if result.dtype == torch.bfloat16 else result).numpy()
    else:
        result = list(torch.from_numpy(result) if isinstance(result, np.ndarray) else result)
    return result


def sparse_vectors(
    rows: NDArray[Any],
    model: SparseEncoder,
    *,
    single: bool,
    convert_to_tensor: bool,
    convert_to_sparse_tensor: bool,
    save_to_cpu: bool,
    max_active_dims: int | None,
) -> Any:
    """Return sparse rows in the form of `SparseEncoder.encode`, which gives no inference tensors.

    rows: array of n objects, each float32 [entries, 2], dimensions and values. Other arguments as in `encode`.
    """
    width, device = int(model.get_embedding_dimension() or 0), "cpu" if save_to_cpu else model.device
    counts = np.array([len(entries) for entries in rows], np.int64)
    entries = np.concatenate(rows) if len(rows) else np.zeros((0, 2), np.float32)
    places = np.stack([np.repeat(np.arange(len(rows)), counts), entries[:, 0].astype(np.int64)])
    if max_active_dims is not None:
        largest = _largest(places[0], np.abs(entries[:, 1]), counts, max_active_dims)
        places, entries = places[:, largest], entries[largest]
    # torch converts strided indices, as of selected columns, to CSR by reading beyond them
    places = np.ascontiguousarray(places)
    values = torch.from_numpy(np.ascontiguousarray(entries[:, 1])).to(device, model.dtype)
    size = (len(rows), width)
    result: Any = torch.sparse_coo_tensor(
        torch.from_numpy(places).to(device), values, size, is_coalesced=True, check_invariants=False
    )
    if not convert_to_sparse_tensor:
        result = result.to_dense()
    if not convert_to_tensor:
        result = list(result)
    return result[0] if single else result


def _largest(rows: NDArray[np.int64], magnitudes: Floats32, counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the indices of the `most` largest entries of each row, in order. rows: of the entries, ascending."""
    order = np.lexsort((-magnitudes, rows))
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[rank < most])


@torch.inference_mode()
def token_vectors(
    rows: NDArray[Any],
    model: MultiVectorEncoder | SentenceTransformer,
    *,
    single: bool,
    convert_to_numpy: bool = False,
    normalize: bool = False,
    pooling: Any = None,
    task: str | None = None,
) -> Any:
    """Return token vectors in the form of `encode` with `output_value="token_embeddings"`: a list of tensors.

    rows: array of n objects, each float32 [tokens, width]. Other arguments as in `MultiVectorEncoder.encode`.
    """
    # copies, since stored rows are read-only, and repeats of a text share one array
    matrices = [torch.from_numpy(row.copy()).to(model.device, model.dtype) for row in rows]
    if normalize:
        matrices = [torch.nn.functional.normalize(matrix, p=2, dim=-1) for matrix in matrices]
    if pooling is not None:
        matrices = pooling.pool(matrices, task=task)
    result: list[Any] = matrices
    if convert_to_numpy:  # NumPy has no bfloat16
        result = [(one.float() if one.dtype == torch.bfloat16 else one).cpu().numpy() for one in matrices]
    return result[0] if single else result


@torch.inference_mode()
def scores(
    logits: Floats32,
    model: CrossEncoder,
    *,
    single: bool,
    activation: Callable[[torch.Tensor], torch.Tensor] | None,
    softmax: bool,
    convert_to_numpy: bool,
    convert_to_tensor: bool,
) -> Any:
    """Return logits as the scores of `CrossEncoder.predict`. logits: float32 [n, labels]."""
    values = torch.from_numpy(logits).to(model.device)
    activation = model.activation_fn if activation is None else activation
    if activation is not None:
        values = activation(values)
    if model.num_labels == 1 and values.ndim > 1:
        values = values.squeeze(-1)
    if softmax and values.ndim > 1:
        values = torch.nn.functional.softmax(values, dim=1)
    result: Any = values if convert_to_tensor else values.float().cpu().numpy() if convert_to_numpy else list(values)
    return result[0] if single else result
