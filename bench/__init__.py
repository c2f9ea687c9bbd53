"""Speed, accuracy and their figures, run from a checkout: ``python -m bench`` lists the commands.

No part of the wheel: it may use `sisa_kernels` and `sisa_model`, neither of them may use it.
"""
