"""Neurons drawn at random: what dropping as many does, whichever they are."""

import numpy as np
import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.document_ids.ids import mix
from litgpt_memsinks.localise.neurons import Suffixes, shape_of


def random(model: BaseGPT, documents: Suffixes, seed: int) -> torch.Tensor:
    """Uniform numbers, float32 ``(B, L, d_ff)``, that depend on the document and the seed only."""
    states = mix(np.array(documents.digests, dtype=np.uint64), seed, "random").tolist()
    return torch.stack(
        [torch.rand(shape_of(model), generator=torch.Generator().manual_seed(state % 2**63)) for state in states]
    )
