"""Started by torchrun in test_parallel.py: trains a JSON file's runs in one process group."""

import json
import logging
import sys
from pathlib import Path

import torch.distributed as dist

from sisa_model.runs.config import TrainConfig
from sisa_model.training.trainer import train

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
dist.init_process_group("gloo")
for fields in json.loads(Path(sys.argv[1]).read_text()):
    fields["data"] = tuple(map(Path, fields["data"]))
    fields["out"] = Path(fields["out"])
    fields["mix"] = tuple(fields.get("mix", ()))
    train(TrainConfig(**fields))
dist.destroy_process_group()
