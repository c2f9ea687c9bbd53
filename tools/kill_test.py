"""Kills a training run at random moments, resumes it each time, and compares its end.

The end is compared with that of a run left alone; the kills are SIGKILL. One process, on the CPU;
about a minute. Exits 0 if the final weights are bit for bit the same, and every step is logged
once."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import read_rows
from sisa_model.runs.weights import newest_weights
from sisa_model.training.trainer import train

STEPS = 600


def launch(config: TrainConfig) -> int:
    """Start or resume the run in a process of its own, forked with torch imported; its id."""
    pid = os.fork()
    if pid == 0:
        output = os.open(config.out.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            begun = (config.out / "run.json").is_file()
            train(TrainConfig(out=config.out, resume=True) if begun else config)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def finish(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Let the run end; its weights. AssertionError: it fails, or has not logged every step once."""
    status = os.waitpid(launch(config), 0)[1]
    assert status == 0, config.out.with_suffix(".txt").read_text()
    steps = [row["step"] for row in read_rows(config.out / "train.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    return load_file(newest_weights(config.out) / "model.safetensors")


def run_config(scratch: Path, name: str) -> TrainConfig:
    """A short run of a folder of this name, on a text beside it."""
    text = scratch / "text.txt"
    sentences = [f"{n} the quick brown fox jumps over {n * n} lazy dogs; " for n in range(2000)]
    text.write_text("".join(sentences))
    return TrainConfig(
        data=(text,),
        out=scratch / name,
        steps=STEPS,
        seq_len=32,
        batch_size=2,
        val_every=50,
        val_blocks=2,
        save_every=3,
        sample_tokens=0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("seed", type=int, nargs="?", default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other threads of OpenMP's
    moment = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        alone = run_config(Path(scratch), "alone")
        killed = run_config(Path(scratch), "killed")
        start = time.time()
        wanted = finish(alone)
        longest = 3 * (time.time() - start) / args.kills
        for count in range(1, args.kills + 1):
            pid = launch(killed)
            time.sleep(moment.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            steps = len(read_rows(killed.out / "train.jsonl"))
            names = ", ".join(sorted(p.name for p in (killed.out / "checkpoints").glob("*")))
            print(f"kill {count}: {steps} steps logged, on the disk {names}", flush=True)
        found = finish(killed)
        same = all(torch.equal(wanted[name], found[name]) for name in wanted)
    verdict = "the same, every step logged once" if same else "DIFFER"
    print(f"after {args.kills} kills: weights {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
