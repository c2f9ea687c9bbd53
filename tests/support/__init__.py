"""What tests share: problems for operators, models, run folders."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
