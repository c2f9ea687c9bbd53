"""``python -m sisa_model``: the command ``sisa``, in the form that torchrun starts (``torchrun ...
-m sisa_model train``).
"""

import sys

from sisa_model.cli import main

sys.exit(main())
