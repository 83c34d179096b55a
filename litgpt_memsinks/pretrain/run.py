"""What the parts of a training run with sinks share: its settings, and LitGPT's training state once there is one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from litgpt.args import EvalArgs, TrainArgs

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.data.data import MemSinksData


@dataclass
class Run:
    """One call of ``litgpt.pretrain.main`` with sinks."""

    fabric: L.Fabric
    """Launched"""
    config: MemSinksConfig
    """Of the model"""
    data: MemSinksData
    """Where tokens and IDs come from"""
    train: TrainArgs
    """LitGPT's training settings"""
    eval: EvalArgs
    """LitGPT's validation settings"""
    out_dir: Path
    """Folder of the checkpoints"""
    devices: int
    """Devices per node"""
    num_nodes: int
    """Nodes"""
    tokenizer_dir: Path
    """The tokenizer that checkpoints carry"""
    data_digest: str | None
    """Of the training stream, see ``manifest.Split``; ``None`` if the manifest does not know the split"""
    state: dict[str, Any] = field(default_factory=dict)
    """LitGPT's training state, with ``iter_num`` in micro batches and ``step_count`` in optimizer steps; empty until
    training begins"""
    stop_signal: int = 0
    """Number of the signal that asked this process to stop; 0 if none did"""
    saved_step: int | None = None
    """``step_count`` at which this process saved last"""
