"""R2-D2 in the loops of others, on scikit-learn's digits, of which 50 are labelled: ``python -m r2d2fast.examples.ddp`` (plain
PyTorch), ``lightning``, ``accelerate`` and ``transformers``. Each is what one would write for data and a network of one's own;
digits.py is the rest."""
