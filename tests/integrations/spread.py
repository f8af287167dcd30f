"""One process of several that share the tokens of a clip: makes a guided clip, and saves it where it is asked to.

python -m tests.integrations.spread FILE RANK PORT
"""

import sys
from unittest import mock

import torch

import stgfast
from stgfast import Guidance, Perturbation
from tests.integrations.test_families import FAMILIES
from tests.precision import computing_in

PROCESSES = 2
WAN = FAMILIES["Wan"]
GUIDANCE = Guidance([Perturbation([3], kind="attention"), Perturbation([1, 3], kind="attention")])


def main(file, rank, port):
    from diffusers import ContextParallelConfig

    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=int(rank), world_size=PROCESSES)
    with computing_in(torch.float64):
        pipe = WAN.build()
        with mock.patch("torch.accelerator.device_count", return_value=PROCESSES):  # diffusers counts GPUs
            pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES))
        made = WAN.run(stgfast.accelerate(pipe, GUIDANCE, max_rows="all"))
    (blocks,) = {tuple(b) for way, b in stgfast.explain(pipe, **WAN.arguments(1)).attention.items() if "in one" in way}
    torch.save((made, blocks), f"{file}.{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
