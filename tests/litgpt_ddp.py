"""``litgpt``, with DDP in place of the FSDP that it asks for on several devices, so that it runs on CPU."""

import litgpt.pretrain
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from litgpt.__main__ import main


def on_cpu(strategy, **settings):
    return Fabric(strategy=DDPStrategy(process_group_backend="gloo"), accelerator="cpu", **settings)


litgpt.pretrain.L.Fabric = on_cpu

if __name__ == "__main__":
    main()
