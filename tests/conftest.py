"""Small models run fastest on one thread, and the same on every machine."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
