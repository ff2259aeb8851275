"""The relay lane: requests that LiteLLM would pass on unchanged go to OpenAI-speaking providers
directly, and their answers come back as they are.

`forms.py` says when two requests are alike, `rules.py` what LiteLLM made of one of them, `ear.py`
how that is overheard, `answers.py` and `events.py` which answers need nobody to read them, and
`lanes.py` which lane a call takes.
"""
