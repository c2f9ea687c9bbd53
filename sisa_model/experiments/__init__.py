"""Many runs: the paper's study, comparisons, plots and reports beside published figures."""
