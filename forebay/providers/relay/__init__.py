"""The relay lane: requests that LiteLLM would pass on unchanged go to OpenAI-speaking providers
directly, and their answers come back as they are.

`forms.py` says when two requests are alike, `rules.py` what LiteLLM made of one of them, `ear.py`
how that is overheard, `lessons.py` who waits for it, `answers.py` and `events.py` which answers
need nobody to read them, `pool.py` and `connection.py` speak HTTP, and `lanes.py` says which lane a
call takes.
"""
