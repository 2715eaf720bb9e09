"""Records to examples to token ids to the batch at step s."""

from jaxpref.data.chat import stop_ids
from jaxpref.data.dataset import TokenizedDataset
from jaxpref.data.examples import Example
from jaxpref.data.load import Data, check, check_batch_size, load, load_file
from jaxpref.data.read import read_examples
from jaxpref.data.stream import BatchStream
from jaxpref.data.tokenize import load_tokenizer, tokenize

__all__ = [
    "BatchStream",
    "Data",
    "Example",
    "TokenizedDataset",
    "check",
    "check_batch_size",
    "load",
    "load_file",
    "load_tokenizer",
    "read_examples",
    "stop_ids",
    "tokenize",
]
