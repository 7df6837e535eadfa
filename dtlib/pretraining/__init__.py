"""Pre-training: a small GPT-2 or ImageGPT learns tokens, and fine-tuning starts from its blocks.

Read `corpus.py` first: what every source of tokens offers. `synthetic.py` (Markov chains),
`images.py` (photographs, CIFAR-10) and `language.py` (English) each make one. `training.py` trains
a model on it and writes a folder that `dtlib.starts` reads. `card.md` is that folder's README.
"""
