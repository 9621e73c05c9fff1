"""A server for any OpenAI client: models behind HTTP, many streams at a time.

engine.py   the streams of one model, drawn together by a thread
api.py      what clients send and get, as the `openai` package reads it
app.py      routes, errors, and what is refused
"""
