"""Decision Transformers from pre-trained starting points: data, model, training, on disk.

Read the core in this order: tasks, data, model, config, starts, build, train, evaluate, runs. One
idea runs through it: values (config) become objects (build), objects give numbers (train,
evaluate), and numbers go to disk (runs).

Shapes in docstrings and comments use these letters::

    B  windows or episodes side by side      S  dimensions of a state
    K  time steps of a window (context)      A  dimensions of an action
    T  tokens of a window, at most 3K        H  attention heads of a block
    D  width of the model                    L  blocks of the model

Paper A is Takagi (NeurIPS 2022, arXiv 2211.09817), paper B is Reid et al. (2022, arXiv 2201.12122).
[code] marks what their released code does, [text] what the paper says, where the two differ.
"""
