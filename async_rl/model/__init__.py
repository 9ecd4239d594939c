"""WHAT IS TRAINED. In: a Hugging Face model folder. Out: one definition of each architecture, shared
by the engine that samples and the trainer that learns, and the tokenizer.

Invariant: generator and trainer run the same arithmetic on the same weights.
Nobody waits here. This package and `folder` import no torch until weights are loaded; `decoder`,
`attention` and `huggingface` do.
"""

from async_rl.model.folder import check_folder, load_model, save_folder
from async_rl.model.tokenizer import Tokenizer

__all__ = ["Tokenizer", "check_folder", "load_model", "save_folder"]
