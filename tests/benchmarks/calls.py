"""Alternatives for the harness, to be made in another process: what it imports is little."""

import os


def process(path):
    """A call that notes the process it runs in."""

    def call():
        with open(path, "a") as file:
            print(os.getpid(), file=file)

    return call


def failing(error, after):
    """A call that fails after some that do not; with none, it cannot even be made."""
    left = [None] * after

    def call():
        if not left:
            raise error
        left.pop()

    return call if after else call()
