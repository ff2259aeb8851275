"""How providers are reached: `base.py` is the protocol, `litellm.py` the lane to all of them,
`local.py` the embedded models, `failures.py` what providers' failures become."""
