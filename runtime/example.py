"""Ask a bundle about a picture: `python example.py BUNDLE PICTURE QUESTION`."""

import sys

from edgevlm_runtime import Bundle, Session

folder, picture, question = sys.argv[1:]
session = Session(Bundle.open(folder))

for event in session.stream(question, [picture]):
    print(event.text, end="", flush=True)
    if event.completion is not None:
        timings = event.completion.timings
        print(f"\n{timings.first_token_ms:.0f} ms to the first token,", end=" ")
        print(f"{timings.tokens_per_second:.0f} tokens a second")
