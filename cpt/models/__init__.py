"""Models, one file each; the file's name is the model's name in the settings. Each opens with its `Settings` and holds
one class `Model`, written for one device.

What the rest of the project asks of a file: `Settings` (with `faults`, `shapes`, `num_parameters`, `flops_per_token`),
`Model` (`forward`, `initialise`, `initial_value`) and `decays`.
"""
