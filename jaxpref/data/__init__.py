"""Records to examples to token ids to the batch at step s."""

from jaxpref.data.chat import stop_ids
from jaxpref.data.dataset import TokenizedDataset
from jaxpref.data.examples import Example
from jaxpref.data.load import Data, check, check_batch_size, limits_of, load, load_file
from jaxpref.data.read import read_examples
from jaxpref.data.stream import BatchStream, budget_of, stream_of
from jaxpref.data.tokenize import tokenize

__all__ = [
    "BatchStream",
    "Data",
    "Example",
    "TokenizedDataset",
    "budget_of",
    "check",
    "check_batch_size",
    "limits_of",
    "load",
    "load_file",
    "read_examples",
    "stop_ids",
    "stream_of",
    "tokenize",
]
