"""Learning rates as pure functions of progress, one file each.

A file here opens with its frozen `Settings` and holds one class `Schedule(settings, stage_tokens, rate_before)`, whose
`rate(progress)` is the learning rate of the next step. `stage_tokens` is the length of the stage, all tokens of all
ranks; `rate_before` is the last learning rate of the stage or the parent before, 0.0 if there was none.
"""
