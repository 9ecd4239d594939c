"""The model: what is sampled from and trained.

In: a Hugging Face model folder. Out: one definition of each architecture, shared by the engine that samples and the
trainer that learns, and the tokenizer.
Invariant: generator and trainer run the same arithmetic on the same weights.
Who waits: nobody. This package, `architecture`, `folder`, `tokenizer`, `varlen` and `create` import no torch until
weights are loaded; `decoder`, `attention`, `huggingface` and `lora` do.
"""

from async_rl.model.folder import check_folder, load_model, save_folder
from async_rl.model.tokenizer import Tokenizer

__all__ = ["Tokenizer", "check_folder", "load_model", "save_folder"]
