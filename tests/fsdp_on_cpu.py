"""FSDP2 on CPU processes over gloo. Run as a script, it runs `train.py` with it.

Accelerate uses DDP for CPU processes even if its config file asks for FSDP. Importing this module changes that one
decision. Launcher, config file, sharding, clipping and saving are the code that runs on GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


ROOT = Path(__file__).parents[1]
original_init = state.AcceleratorState.__init__


def init_with_fsdp_on_cpu(
    self: state.AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **options: Any
) -> None:
    original_init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin


state.AcceleratorState.__init__ = init_with_fsdp_on_cpu


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import train

    train.main()
