"""Decision Transformers from pre-trained starting points: model, offline data, training, measures."""
