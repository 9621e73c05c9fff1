"""A server for a browser and any OpenAI client: models behind HTTP, many streams at a time.

engine.py   the streams of one model, drawn together by a thread
api.py      what clients send and get, as the `openai` package reads it
prompts.py  prompts as tokens
look.py     what a model thinks at one place of a text
app.py      routes, errors, and what is refused
metrics.py  what a Prometheus reads
page/       what a browser gets
"""
