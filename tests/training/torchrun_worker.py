"""Started by torchrun in test_parallel.py: trains the runs of a JSON file, one after the other, in
one process group.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from sisa_model.runs.config import TrainConfig
from sisa_model.training.trainer import train

dist.init_process_group("gloo")
for fields in json.loads(Path(sys.argv[1]).read_text()):
    data, out, tasks = (
        tuple(map(Path, fields["data"])),
        Path(fields["out"]),
        tuple(fields.get("tasks", ())),
    )
    train(TrainConfig(**{**fields, "data": data, "out": out, "tasks": tasks}))
dist.destroy_process_group()
