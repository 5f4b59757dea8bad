"""Owns what comes from other tools' files, and what goes to them; a log lies between.

Importing writes a ``.stream`` log by the writer that captures have, so that alignment, labels,
compaction and datasets are what they always are; exporting reads a dataset. Kinds of sources, and
what each is recognised by (``importing.KINDS``; asked in this order):

================ ==================================================================================
kind             recognised by
================ ==================================================================================
``vllm``         safetensors files of ``hidden_states`` [token, layer, feature] and ``token_ids``
``saelens``      a folder with ``dataset_info.json``, ``state.json`` and the Arrow files it names
``activault``    ``metadata.json`` with ``batches_per_file``, and ``*.saved.pt``; or a run of them
``saev``         ``metadata.json`` with ``layers``, and ``acts000000.bin``
``torch``        ``.pt`` and ``.pth`` files: names to tensors, such as a ``cache_dict``
``folder``       ``.npy`` and ``.safetensors`` files, one or a folder of them
================ ==================================================================================

Every file is hostile: sizes are checked against the file before memory is taken, nothing is
unpickled but by ``torch.load(weights_only=True)``, and no name leads out of the folder.
"""
