"""lm-evaluation-harness' own command line with the model `sparsecli`: see `harness`."""

from lm_eval.__main__ import cli_evaluate

from sparsecli.evaluate import harness  # noqa: F401  registers the model

cli_evaluate()
