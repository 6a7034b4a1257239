"""When to compute a denoising step and how to forecast it. Pure decisions over numbers: no processes, no models.

Reading order: observation and policy (the seam), policies/dicache, forecast, controller, exchange, spec.
"""
