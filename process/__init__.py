"""One process among others: how it meets them, how it waits, how a signal ends it, what it computes on.

Open first: ``waiting.py``. It knows nothing of models and data. What a training does with a wish to stop is in
``runtime/``.
"""
