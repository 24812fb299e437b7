"""From the model's own vectors to what `SentenceTransformer.encode` returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings, truncate_embeddings


def finished(
    outputs: NDArray[np.float32] | torch.Tensor,
    model: SentenceTransformer,
    *,
    single: bool,
    precision: str | None,
    convert_to_numpy: bool,
    convert_to_tensor: bool,
    normalize: bool,
    truncate_dim: int | None,
) -> Any:
    """Cut, normalise, quantise and convert in the order in which `encode` does.

    outputs: [n, width], the model's vectors, float32 where they are an array. Returns a numpy array, a tensor on
    the model's device, or a list of tensors; one vector of it where the input was `single`.
    """
    to_numpy = convert_to_numpy and not convert_to_tensor
    dim = truncate_dim if truncate_dim is not None else model.truncate_dim
    plain = isinstance(outputs, np.ndarray) and to_numpy and precision in (None, "", "float32")
    if plain and not normalize and dim is None and model.dtype == torch.float32:  # they are what is wanted
        return outputs[0] if single else outputs
    result = _converted(outputs, model, precision, to_numpy, convert_to_numpy, convert_to_tensor, normalize, dim)
    return result[0] if single else result


@torch.inference_mode()
def _converted(
    outputs: NDArray[np.float32] | torch.Tensor,
    model: SentenceTransformer,
    precision: str | None,
    to_numpy: bool,
    convert_to_numpy: bool,
    convert_to_tensor: bool,
    normalize: bool,
    dim: int | None,
) -> Any:
    given = torch.from_numpy(outputs) if isinstance(outputs, np.ndarray) else outputs
    vectors = given.to(device="cpu" if to_numpy else model.device, dtype=model.dtype)
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
        if isinstance(result, torch.Tensor):  # numpy has no bfloat16
            result = (result.float() if result.dtype == torch.bfloat16 else result).numpy()
    else:
        result = list(torch.from_numpy(result) if isinstance(result, np.ndarray) else result)
    return result
