"""Convert the model's own vectors to the result of `SentenceTransformer.encode`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
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
