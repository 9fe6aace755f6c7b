"""Requests to the server of `server_fixtures`, and what its model answers."""

SCRIPT = "Hi_you!🙂"
CHAT, COMPLETE, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GOOD = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    COMPLETE: {"prompt": "H"},
    RESPOND: {"input": "Hello"},
}
CONTEXT = 20_000
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def text(path, got):
    """The text of the answer to a request at that path."""
    if path == RESPOND:
        return got.json["output"][0]["content"][0]["text"]
    choice = got.json["choices"][0]
    return choice["text"] if path == COMPLETE else choice["message"]["content"]
