"""Greets whoever asks, over HTTP or, with --check, itself."""
import os
import sys

from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello():
    return {"greeting": "hello from flask", "user": os.getuid()}


if __name__ == "__main__":
    if "--check" in sys.argv:
        print(app.test_client().get("/").get_json()["greeting"])
    else:
        app.run("0.0.0.0", int(os.environ["PORT"]))
