"""Models, one file each; the file's name is the model's name in the settings.

A file holds
    Settings    a frozen dataclass, the shape of the model:
                vocabulary, width, layers, heads, num_kv_heads, width_of_mlp, longest_sequence, tied, rope_base,
                rope_scaling
                faults()                    one line for each contradiction
                shapes                      every parameter by name with its shape, in order, a tied one once
                num_parameters, flops_per_token(sequence_length)
                attends_across_documents    a fact of how the family was trained
    CUTS        how each parameter is cut for tensor parts; see layers/cuts.py, and layers/cutting.py for who does it
    Model       written for one device, made of `(settings, kernels)`:
                forward(tokens, targets=None, documents=None)
                initialise(seed), initial_value(name, seed), decays(name)
                materialise(device)         memory for a model built under torch.device("meta"); then fill it by name

What two models do alike is in layers/: Decoder (the whole but for its blocks), Shape (what settings derive).
"""
