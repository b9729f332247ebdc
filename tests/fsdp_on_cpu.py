"""FSDP2 on processes of the CPU, over gloo; as a script, `train.py` under it.

Accelerate makes FSDP of processes that hold an accelerator, and DDP of those that don't, whatever the config file says.
This corrects the one decision, as `AcceleratorState` takes it for GPUs: launcher, config file, sharding, clipping and
saving are the code that runs there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


ROOT = Path(__file__).parents[1]
as_accelerate_has_it = state.AcceleratorState.__init__


def with_fsdp_on_cpu(self: state.AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    as_accelerate_has_it(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin


state.AcceleratorState.__init__ = with_fsdp_on_cpu


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import train

    train.main()
