"""One kind of progress bar: a widget in a notebook, text in a terminal and in a batch."""

import os

if "DTLIB_FIGURES" in os.environ:  # set by the batch runner, which shows text only
    from tqdm import tqdm
else:
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
