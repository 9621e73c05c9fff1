"""A server for a browser and any OpenAI client: models behind HTTP, many streams at a time.

engine.py   the streams of one model, drawn together by a thread
api.py      what clients send and get, as the `openai` package reads it
look.py     what a model thinks at one place of a text
app.py      routes, errors, and what is refused
page/       what a browser gets
"""
