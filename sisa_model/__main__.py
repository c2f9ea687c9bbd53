"""``python -m sisa_model``: the command ``sisa``, in the form that torchrun starts."""

import sys

from sisa_model.cli import main

sys.exit(main())
